// The functions of iirsnn.kernels, called from C++: see kernels/eager.py and kernels/eager_batch_norm.py.
#include "lif/torch/triton_call.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "lif/torch/bn_lif_ops.h"
#include "lif/torch/lif_ops.h"

namespace iirsnn {
namespace {

namespace py = pybind11;

// Owned for as long as the process lives; null before Python hands them over.
struct TritonFunctions {
  PyObject *forward = nullptr, *backward = nullptr, *bn_forward = nullptr, *bn_backward = nullptr;
} triton_functions;

// Python's object for an argument.
py::object as_python(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }
py::object as_python(const std::string& word) { return py::str(word); }
py::object as_python(double number) { return py::float_(number); }
py::object as_python(bool yes) { return py::bool_(yes); }

// The tensors of the tuple that a function of Python returns, which none of torch's ops inside gives a gradient.
template <size_t kCount, typename... Arguments>
std::array<Tensor, kCount> call_python(const char* name, PyObject* function, const Arguments&... arguments) {
  RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>());
  const py::gil_scoped_acquire gil;
  const at::AutoDispatchBelowADInplaceOrView below;
  const std::array<py::object, sizeof...(Arguments)> objects{as_python(arguments)...};
  std::array<PyObject*, sizeof...(Arguments)> pointers;
  for (size_t i = 0; i < objects.size(); ++i) pointers[i] = objects[i].ptr();
  const auto found =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(function, pointers.data(), pointers.size(), nullptr));
  if (!found) {  // it may have to reach another thread
    python_error error;
    error.persist();
    throw error;
  }
  TORCH_INTERNAL_ASSERT(PyTuple_Check(found.ptr()) && PyTuple_GET_SIZE(found.ptr()) == kCount);
  std::array<Tensor, kCount> tensors;
  for (size_t i = 0; i < kCount; ++i) {
    PyObject* const item = PyTuple_GET_ITEM(found.ptr(), i);
    if (item != Py_None) tensors[i] = THPVariable_Unpack(item);
  }
  return tensors;
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> op_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool interpreting() {
  const char* const asked = std::getenv("TRITON_INTERPRET");
  return asked != nullptr && strcmp(asked, "1") == 0;
}

}  // namespace

bool triton_takes(const char* backend, const Tensor& x) {
  if (triton_functions.forward == nullptr || x.scalar_type() == at::kDouble) return false;
  if (strcmp(backend, "triton") == 0) return x.is_cuda() || (x.is_cpu() && interpreting());
#if defined(IIRSNN_WITH_CUDA)
  return false;
#else
  return x.is_cuda() && strcmp(backend, "auto") == 0;
#endif
}

std::tuple<Tensor, Tensor> lif_by_triton(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                         const OptionalTensor& v0, Options options) {
  options.triton = true;
  return lif_with_gradient(x, threshold, leak, v0, options, [&] {
    auto [s, v] = call_python<2>("iirsnn::triton_lif_forward", triton_functions.forward, x, threshold, leak,
                                 or_undefined(v0), options.reset, options.v_reset, options.return_v);
    return std::tuple(std::move(s), std::move(v));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_backward_by_triton(const Tensor& grad_s, const Tensor& grad_v,
                                                                  const Tensor& x, const Tensor& threshold,
                                                                  const Tensor& leak, const Tensor& v0,
                                                                  const Options& options, bool parameters) {
  if (for_the_ops(grad_s, grad_v, x, threshold, leak, v0)) {
    static const auto op = op_of<BackwardSignature>("iirsnn::triton_lif_backward");
    return op.call(grad_s, or_none(grad_v), x, threshold, leak, or_none(v0), options.reset, options.v_reset,
                   options.detach_reset, options.surrogate, options.surrogate_scale, parameters);
  }
  refuse_tangents(grad_s, grad_v, x, threshold, leak, v0);
  auto gradients = std::tuple_cat(call_python<4>(
      "iirsnn::triton_lif_backward", triton_functions.backward, grad_s, grad_v, x, threshold, leak, v0, options.reset,
      options.v_reset, options.detach_reset, options.surrogate, options.surrogate_scale, parameters));
  refuse_second(gradients, grad_s, grad_v, x, threshold, leak, v0);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_by_triton(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, double eps, Options options,
                                                            const Running& running) {
  options.triton = true;
  return bn_lif_with_gradient(x, weight, bias, threshold, leak, options, [&] {
    return std::tuple_cat(call_python<4>("iirsnn::triton_bn_lif_forward", triton_functions.bn_forward, x,
                                         or_undefined(weight), or_undefined(bias), threshold, leak, eps, options.reset,
                                         options.v_reset, running.mean, running.var, running.calls, running.momentum));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_lif_backward_by_triton(
    const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, const Tensor& threshold, const Tensor& leak, const Options& options, bool learned) {
  if (for_the_ops(grad_s, x, mean, rstd, weight, bias, threshold, leak)) {
    static const auto op = op_of<BnLifBackwardSignature>("iirsnn::triton_bn_lif_backward");
    return op.call(grad_s, x, mean, rstd, or_none(weight), or_none(bias), threshold, leak, options.reset,
                   options.v_reset, options.detach_reset, options.surrogate, options.surrogate_scale);
  }
  refuse_tangents(grad_s, x, mean, rstd, weight, bias, threshold, leak);
  auto gradients = std::tuple_cat(call_python<5>(
      "iirsnn::triton_bn_lif_backward", triton_functions.bn_backward, grad_s, x, mean, rstd, weight, bias, threshold,
      leak, options.reset, options.v_reset, options.detach_reset, options.surrogate, options.surrogate_scale, learned));
  refuse_second(gradients, grad_s, x, mean, rstd, weight, bias, threshold, leak);
  return gradients;
}

void bind_triton(py::module_& m) {
  m.def(
      "take_triton",
      [](py::object forward, py::object backward, py::object bn_forward, py::object bn_backward) {
        triton_functions = {forward.release().ptr(), backward.release().ptr(), bn_forward.release().ptr(),
                            bn_backward.release().ptr()};
      },
      py::arg("forward"), py::arg("backward"), py::arg("bn_forward"), py::arg("bn_backward"),
      "The Triton kernels: forward and backward of iirsnn.kernels.eager, forward_counted and backward of "
      "eager_batch_norm; for lif_call and bn_lif_call.");
}

}  // namespace iirsnn
