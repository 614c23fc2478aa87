// The shortest way from Python to a training step of BatchNorm and LIF in one: arguments read in C++, one dispatch, and
// the running statistics.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "lif/torch/bn_lif_ops.h"
#include "lif/torch/call_arguments.h"
#include "lif/torch/lif_call.h"
#include "lif/torch/triton_call.h"

namespace iirsnn {
namespace {

namespace py = pybind11;

// As update_running_statistics of iirsnn/nn/batch_norm.py, with its bits.
void count_call(const Running& running, const Tensor& mean, Tensor var, double count) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const double unbiased = count / (count - 1);
  if (mean.is_cpu()) {  // by hand: a dispatch costs more
    float* of = var.mutable_data_ptr<float>();
    for (int64_t c = 0; c < var.numel(); ++c) of[c] *= float(unbiased);
    ++*running.calls.mutable_data_ptr<int64_t>();
  } else {
    var.mul_(unbiased);
    running.calls.add_(1);
  }
  running.mean.lerp_(mean, running.momentum);
  running.var.lerp_(var, running.momentum);
}

// What autograd is told of memory that was written without it.
void was_written(const Running& running) {
  for (const Tensor* written : {&running.mean, &running.var, &running.calls}) {
    if (!written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
  }
}

// Plain, contiguous and beside x; else undefined.
Tensor held(PyObject* value, const Tensor& x, at::ScalarType dtype, int64_t size) {
  const Tensor* tensor = plain_tensor(value);
  const bool taken = tensor != nullptr && tensor->scalar_type() == dtype && tensor->numel() == size &&
                     tensor->device() == x.device() && tensor->layout() == at::kStrided && tensor->is_contiguous();
  return taken ? *tensor : Tensor();
}

// Spikes of a call in training, whose norm counts it; None where iirsnn.nn.batch_norm has to take the long way, which
// says what is wrong, if anything is.
PyObject* bn_lif_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  enum {
    kBackend,
    kX,
    kWeight,
    kBias,
    kThreshold,
    kLeak,
    kMean,
    kVar,
    kCalls,
    kMomentum,
    kEps,
    kReset,
    kCount = kReset + CallOptions::kCount
  };
  TORCH_CHECK_TYPE(count == kCount, "bn_lif_call: expected ", int(kCount), " arguments, got ", count);
  const auto leave = [] { Py_RETURN_NONE; };
  const Tensor* x_pointer = plain_tensor(arguments[kX]);
  const char* backend = word(arguments[kBackend]);
  CallOptions how;
  if (x_pointer == nullptr || backend == nullptr || watched() || transformed() || !how.read(arguments + kReset))
    return leave();
  const Tensor& x = *x_pointer;
  const at::ScalarType dtype = x.scalar_type();
  const bool triton = triton_takes(backend, x), half = dtype == at::kHalf && (triton || x.is_cuda());
  const bool fused = dtype == at::kFloat || dtype == at::kBFloat16 || half;
  if (!triton && !takes(backend, x)) return leave();
  if (!fused || x.dim() < 3 || !is_dense(x)) return leave();
  const int64_t channels = x.size(2);
  if (x.numel() <= channels) return leave();  // 0, or one value per channel

  const auto channel = [&](int which) { return held(arguments[which], x, at::kFloat, channels); };
  OptionalTensor affine[2];
  for (int i = 0; i < 2; ++i) {
    if (arguments[kWeight + i] == Py_None) continue;
    affine[i] = channel(kWeight + i);
    if (!affine[i]->defined()) return leave();
  }
  Tensor parameters[2];
  for (int i = 0; i < 2; ++i) {
    const Tensor* value = plain_tensor(arguments[kThreshold + i]);
    if (value == nullptr || value->dim() != 1 || (value->numel() != 1 && value->numel() != channels)) return leave();
    parameters[i] = held(arguments[kThreshold + i], x, at::kFloat, value->numel());
    if (!parameters[i].defined()) return leave();
  }
  const Running running{channel(kMean), channel(kVar), held(arguments[kCalls], x, at::kLong, 1),
                        number(arguments[kMomentum])};
  const double eps = number(arguments[kEps]);
  if (!running.mean.defined() || !running.var.defined() || !running.calls.defined()) return leave();
  if (!(eps > 0) || !std::isfinite(eps)) return leave();

  const bool by_op = for_the_ops(x, or_undefined(affine[0]), or_undefined(affine[1]), parameters[0], parameters[1]);
  const bool in_kernel = triton || (x.is_cuda() && !by_op);  // the running statistics
  if (!std::isfinite(running.momentum) && !(in_kernel && arguments[kMomentum] == Py_None)) return leave();
  if (triton && by_op) return leave();
  const Options options{how.reset, how.v_reset, how.detach_reset, how.surrogate, how.scale};
  Tensor s = [&] {
    const py::gil_scoped_release no_gil;
    if (triton) {
      return std::get<0>(
          bn_lif_by_triton(x, affine[0], affine[1], parameters[0], parameters[1], eps, options, running));
    }
#if defined(IIRSNN_WITH_CUDA)
    if (in_kernel) {
      return std::get<0>(bn_lif_with_gradient(x, affine[0], affine[1], parameters[0], parameters[1], options, [&] {
        RECORD_FUNCTION("iirsnn::bn_lif_forward", (std::vector<at::IValue>{x, parameters[0], parameters[1]}));
        const at::AutoDispatchBelowADInplaceOrView below;
        return bn_lif_forward_cuda(x, affine[0], affine[1], parameters[0], parameters[1], eps, options.reset,
                                   how.v_reset, how.detach_reset, options.surrogate, how.scale, &running);
      }));
    }
#endif
    auto [spikes, mean, var, rstd] =
        bn_lif_forward_op().call(x, affine[0], affine[1], parameters[0], parameters[1], eps, how.reset, how.v_reset,
                                 how.detach_reset, how.surrogate, how.scale);
    count_call(running, mean, var, double(x.numel() / channels));
    return spikes;
  }();
  was_written(running);
  return THPVariable_Wrap(std::move(s));
  END_HANDLE_TH_ERRORS
}

PyMethodDef bn_lif_method{
    "bn_lif_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&bn_lif_call)), METH_FASTCALL,
    "bn_lif_call(arg0: str, arg1: Tensor, arg2: object, arg3: object, arg4: Tensor, arg5: Tensor, arg6: Tensor, "
    "arg7: Tensor, arg8: Tensor, arg9: object, arg10: float, arg11: str, arg12: float, arg13: bool, arg14: str, "
    "arg15: object) -> object\n\n"
    "The shortest way to a training step of BatchNormLIF: see iirsnn.nn.batch_norm."};

// mean and rstd, or None.
py::object bn_lif_totals(const Tensor& totals, double eps, const py::object& running_mean,
                         const py::object& running_var, const py::object& calls, std::optional<double> momentum) {
#if defined(IIRSNN_WITH_CUDA)
  const int64_t channels = totals.size(1);
  const Running running{held(running_mean.ptr(), totals, at::kFloat, channels),
                        held(running_var.ptr(), totals, at::kFloat, channels), held(calls.ptr(), totals, at::kLong, 1),
                        momentum.value_or(NAN)};
  const bool kept = running.mean.defined() && running.var.defined() && running.calls.defined();
  if (kept && totals.is_cuda() && !for_the_ops(totals)) {
    auto found = bn_lif_totals_cuda(totals, eps, running);
    was_written(running);
    return py::cast(std::move(found));
  }
#endif
  return py::none();
}

}  // namespace

void bind_bn_lif_call(py::module_& m) {
  m.add_object("bn_lif_call", PyCFunction_New(&bn_lif_method, nullptr));
  m.def("bn_lif_totals", &bn_lif_totals, py::arg("totals"), py::arg("eps"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("calls"), py::arg("momentum"),
        "CUDA totals float64 [3, C] of all processes -> mean, rstd [C], and the call is counted, in one launch; None "
        "where that is for torch's ops: see iirsnn.nn.batch_norm.");
}

}  // namespace iirsnn
