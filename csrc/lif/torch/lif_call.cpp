// The shortest way from Python to lif_forward: arguments read in C++, and one dispatch.
#include "lif/torch/lif_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <string>

#include "lif/lif_checks.h"
#include "lif/torch/lif_ops.h"

namespace iirsnn {
namespace {

namespace py = pybind11;

const Tensor* plain_tensor(py::handle value) {
  return THPVariable_CheckExact(value.ptr()) ? &THPVariable_Unpack(value.ptr()) : nullptr;
}

// Timesteps without holes that do not overlap, as the kernels read them.
bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const int64_t neurons = c10::multiply_integers(x.sizes().slice(1));
  const bool apart = x.size(0) == 1 || x.stride(0) == 0 || x.stride(0) >= neurons;
  return apart && x.detach().select(0, 0).is_non_overlapping_and_dense();
}

// threshold or leak as the op takes it; undefined where it needs more than this.
Tensor parameter(py::handle value, const Tensor& x, bool positive) {
  if (PyFloat_CheckExact(value.ptr())) {
    const double number = PyFloat_AS_DOUBLE(value.ptr());
    if (!std::isfinite(number) || (positive && number <= 0)) return {};
    return at::full({1}, number, x.options().dtype(acc_type(x)));
  }
  const Tensor* tensor = plain_tensor(value);
  if (tensor == nullptr || tensor->dim() != 1 || tensor->scalar_type() != acc_type(x)) return {};
  return *tensor;
}

// (s, v) of a call that needs no conversion; None where it does, or where something is wrong: iirsnn.functional.lif
// then takes the long way, which says what.
py::object lif_call(const std::string& backend, py::handle x_object, py::handle threshold_object,
                    py::handle leak_object, py::handle v0_object, const std::string& reset, double v_reset,
                    bool detach_reset, const std::string& surrogate, double surrogate_scale, bool return_v) {
  const Tensor* x_pointer = plain_tensor(x_object);
  if (x_pointer == nullptr || at::impl::torch_function_mode_enabled()) return py::none();
  const Tensor& x = *x_pointer;
#if defined(IIRSNN_WITH_CUDA)
  const bool here = (x.is_cpu() && backend != "cuda") || (x.is_cuda() && backend != "cpu");
#else
  const bool here = x.is_cpu() && backend != "cuda";
#endif
  const at::ScalarType dtype = x.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  if (!here || !known || x.dim() < 1 || x.size(0) == 0 || !is_dense(x)) return py::none();
  const Tensor threshold = parameter(threshold_object, x, true), leak = parameter(leak_object, x, false);
  if (!threshold.defined() || !leak.defined() || threshold.numel() != leak.numel()) return py::none();
  for (const Tensor& value : {threshold, leak}) {
    const bool channels = x.dim() >= 3 && value.numel() == x.size(2);
    if (value.device() != x.device() || (value.numel() != 1 && !channels)) return py::none();
  }
  OptionalTensor v0;
  if (!v0_object.is_none()) {
    const Tensor* given = plain_tensor(v0_object);
    if (given == nullptr || given->scalar_type() != acc_type(x) || given->sizes() != x.sizes().slice(1) ||
        given->device() != x.device()) {
      return py::none();
    }
    v0 = *given;
  }
  const auto [s, v] = [&] {
    const py::gil_scoped_release no_gil;
    return lif_forward_op().call(x, threshold, leak, v0, reset, v_reset, detach_reset, surrogate, surrogate_scale,
                                 return_v);
  }();
  const auto object = [](const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); };
  return return_v ? py::make_tuple(object(s), object(v)) : object(s);
}

}  // namespace

void bind_lif_call(py::module_& m) { m.def("lif_call", torch::wrap_pybind_function(&lif_call)); }

}  // namespace iirsnn
