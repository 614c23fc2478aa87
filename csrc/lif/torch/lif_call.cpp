// The shortest way from Python to lif_forward: arguments, or those that a FusedLIF holds, read in C++, and no dispatch
// where nobody watches ops.
#include "lif/torch/lif_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "lif/torch/call_arguments.h"
#include "lif/torch/lif_ops.h"
#include "lif/torch/triton_call.h"

namespace iirsnn {
namespace {

namespace py = pybind11;

// Numbers from which on a call on a CPU is worth giving Python's lock away.
constexpr int64_t kLongCall = 4096;

// threshold or leak as the op takes it; undefined where it needs more than this.
Tensor parameter(PyObject* value, const Tensor& x, bool positive) {
  if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    if (!std::isfinite(number) || (positive && number <= 0)) return {};
    if (!x.is_cpu()) return at::full({1}, number, x.options().dtype(acc_type(x)));
    Tensor one = empty_beside(x, 1, acc_type(x));
    if (acc_type(x) == at::kDouble) {
      *one.mutable_data_ptr<double>() = number;
    } else {
      *one.mutable_data_ptr<float>() = float(number);
    }
    return one;
  }
  const Tensor* tensor = plain_tensor(value);
  if (tensor == nullptr || tensor->dim() != 1 || tensor->scalar_type() != acc_type(x)) return {};
  return *tensor;
}

enum { kBackend, kX, kThreshold, kLeak, kV0, kReset, kReturnV = kReset + CallOptions::kCount, kCount };

// (s, v) or s of a call that needs no conversion; None where it does, or where something is wrong:
// iirsnn.functional.lif then takes the long way, which says what.
PyObject* lif_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kCount, "lif_call: expected ", int(kCount), " arguments, got ", count);
  const auto leave = [] { Py_RETURN_NONE; };
  const Tensor* x_pointer = plain_tensor(arguments[kX]);
  if (x_pointer == nullptr || at::impl::torch_function_mode_enabled()) return leave();
  const Tensor& x = *x_pointer;
  const char* backend = word(arguments[kBackend]);
  CallOptions how;
  if (!backend || !how.read(arguments + kReset) || !PyBool_Check(arguments[kReturnV])) return leave();
  const bool return_v = arguments[kReturnV] == Py_True;
  const at::ScalarType dtype = x.scalar_type();
  const bool float_type = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  const bool triton = triton_takes(backend, x);
  if (!triton && !takes(backend, x)) return leave();
  if (!float_type || x.dim() < 1 || x.size(0) == 0 || !is_dense(x)) return leave();
  const Tensor threshold = parameter(arguments[kThreshold], x, true), leak = parameter(arguments[kLeak], x, false);
  if (!threshold.defined() || !leak.defined() || threshold.numel() != leak.numel()) return leave();
  for (const Tensor* value : {&threshold, &leak}) {
    const bool channels = value->numel() > 0 && x.dim() >= 3 && value->numel() == x.size(2);
    if (value->device() != x.device() || (value->numel() != 1 && !channels)) return leave();
  }
  OptionalTensor v0;
  if (arguments[kV0] != Py_None) {
    const Tensor* given = plain_tensor(arguments[kV0]);
    if (given == nullptr || given->scalar_type() != acc_type(x) || given->sizes() != x.sizes().slice(1) ||
        given->device() != x.device()) {
      return leave();
    }
    v0 = *given;
  }
  const bool by_op = for_the_ops(x, threshold, leak, or_undefined(v0));
  if (triton && by_op) return leave();
  auto [s, v] = [&] {
    const Options options{how.reset, how.v_reset, how.detach_reset, how.surrogate, how.scale, return_v};
    if (triton) return lif_by_triton(x, threshold, leak, v0, options);
    std::optional<py::gil_scoped_release> no_gil;
    if (!x.is_cpu() || x.numel() >= kLongCall) no_gil.emplace();
    const auto arguments = [&](const auto& forward) {
      return forward(x, threshold, leak, v0, options.reset, how.v_reset, how.detach_reset, options.surrogate, how.scale,
                     return_v);
    };
    if (by_op) return arguments([](auto&&... all) { return lif_forward_op().call(all...); });
    return lif_with_gradient(x, threshold, leak, v0, options, [&] {
      RECORD_FUNCTION("iirsnn::lif_forward", (std::vector<at::IValue>{x, threshold, leak, v0}));
      const at::AutoDispatchBelowADInplaceOrView below;
      return arguments(lif_forward);
    });
  }();
  if (!return_v) return THPVariable_Wrap(std::move(s));
  return py::make_tuple(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(s))),
                        py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(v))))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// Of a dict, borrowed; null where it is none, or has no such key.
PyObject* look_up(PyObject* dict, PyObject* key) {
  return dict != nullptr && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
}

// Whether the call of a module with this __dict__ would do no more than its forward: see nn.Module._call_impl.
// everywhere: dicts of hooks of all modules.
bool calls_forward(PyObject* dict, PyObject* everywhere) {
  static PyObject* const hooks[] = {
      PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
  static PyObject* const others[] = {PyUnicode_InternFromString("forward"),
                                     PyUnicode_InternFromString("_compiled_call_impl")};
  const auto empty = [](PyObject* all) { return all != nullptr && PyDict_Check(all) && PyDict_GET_SIZE(all) == 0; };
  for (PyObject* name : hooks)
    if (!empty(look_up(dict, name))) return false;
  for (PyObject* name : others)
    if (look_up(dict, name) != nullptr) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(everywhere); ++i)
    if (!empty(PyTuple_GET_ITEM(everywhere, i))) return false;
  // a tracer and a profiler want to see the module itself
  return !torch::jit::tracer::isTracing() && PyThreadState_Get()->c_profilefunc == nullptr;
}

// lif_call with what the __dict__ of a FusedLIF holds, whose attributes Python looks up for as long as the call takes.
// None as there, and where a neuron is stateful or packs its spikes, or where it is called and calls_forward says no.
PyObject* neuron_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  enum { kDict, kInput, kScales, kEverywhere };
  static const char* const words[kCount] = {"backend", "",        "threshold",    "leak",      "",
                                            "reset",   "v_reset", "detach_reset", "surrogate", "surrogate_scale",
                                            "return_v"};
  static const auto names = [] {
    std::array<PyObject*, kCount> all;
    for (int i = 0; i < kCount; ++i) all[i] = PyUnicode_InternFromString(words[i]);
    return all;
  }();
  static PyObject* const held[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers")};
  static PyObject* const flags[] = {PyUnicode_InternFromString("stateful"), PyUnicode_InternFromString("packed")};
  const bool called = count == kEverywhere + 1 && PyTuple_CheckExact(given[kEverywhere]);
  if (!called && count != kEverywhere) {
    return PyErr_Format(PyExc_TypeError, "neuron_call: expected 3 arguments, or 4 with a tuple, got %zd", count);
  }
  PyObject* const dict = given[kDict];
  if (called && !calls_forward(dict, given[kEverywhere])) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  for (PyObject* flag : flags)
    if (look_up(dict, flag) != Py_False) Py_RETURN_NONE;
  PyObject* arguments[kCount];
  PyObject* const parameters = look_up(dict, held[0]);
  for (int i = 0; i < kCount; ++i) {
    if (i == kThreshold || i == kLeak) {
      arguments[i] = look_up(parameters, names[i]);
      if (arguments[i] == nullptr) arguments[i] = look_up(look_up(dict, held[1]), names[i]);
    } else {
      arguments[i] = look_up(dict, names[i]);
    }
  }
  arguments[kX] = given[kInput];
  arguments[kV0] = Py_None;
  PyObject*& scale = arguments[kReturnV - 1];
  if (scale == Py_None && arguments[kReturnV - 2] != nullptr) scale = look_up(given[kScales], arguments[kReturnV - 2]);
  for (PyObject* argument : arguments)
    if (argument == nullptr) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
  return lif_call(nullptr, arguments, kCount);
}

PyMethodDef neuron_method{"neuron_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&neuron_call)),
                          METH_FASTCALL,
                          "neuron_call(arg0: dict, arg1: Tensor, arg2: dict, arg3: tuple = ()) -> object\n\n"
                          "lif_call with what the __dict__ of a FusedLIF holds, and the scales of surrogates by name; "
                          "with the hooks of all modules, where none of them, nor one of its own, is called."};

PyMethodDef method{
    "lif_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&lif_call)), METH_FASTCALL,
    "lif_call(arg0: str, arg1: Tensor, arg2: object, arg3: object, arg4: object, arg5: str, arg6: float, "
    "arg7: bool, arg8: str, arg9: float, arg10: bool) -> object\n\n"
    "The shortest way to lif_forward: see iirsnn.functional.short_way."};

}  // namespace

void bind_lif_call(py::module_& m) {
  m.add_object("lif_call", PyCFunction_New(&method, nullptr));
  m.add_object("neuron_call", PyCFunction_New(&neuron_method, nullptr));
}

}  // namespace iirsnn
