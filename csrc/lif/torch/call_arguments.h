// What the shortest ways from Python to the ops read their arguments with, by hand: binding them as C++ types would
// cost as much as all the rest. What is not found is for the long way, which says what is wrong.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstring>
#include <iterator>

#include "lif/torch/lif_checks.h"

namespace iirsnn {

inline const Tensor* plain_tensor(PyObject* value) {
  return THPVariable_CheckExact(value) ? &THPVariable_Unpack(value) : nullptr;
}

// Whether auto, or the backend of this name, is the compiled kernels for x.
inline bool takes(const char* backend, const Tensor& x) {
#if defined(IIRSNN_WITH_CUDA)
  if (x.is_cuda()) return strcmp(backend, "auto") == 0 || strcmp(backend, "cuda") == 0;
#endif
  return x.is_cpu() && (strcmp(backend, "auto") == 0 || strcmp(backend, "cpu") == 0);
}

inline bool included(c10::DispatchKey key) { return c10::impl::tls_local_dispatch_key_set().included_.has(key); }

// Whether every op is to be seen from Python, which those done by hand are not.
inline bool watched() { return included(c10::DispatchKey::Python); }

// Whether functions of torch are replaced or transformed (by functorch).
inline bool transformed() {
  return at::impl::torch_function_mode_enabled() || included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A word of ASCII; null for anything else.
inline const char* word(PyObject* value) {
  const char* found = PyUnicode_CheckExact(value) ? PyUnicode_AsUTF8(value) : nullptr;
  if (found == nullptr) PyErr_Clear();
  return found;
}

// NaN where it is none.
inline double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double whole = PyLong_CheckExact(value) ? PyLong_AsDouble(value) : NAN;
  if (whole != -1 || !PyErr_Occurred()) return whole;
  PyErr_Clear();
  return NAN;
}

// reset, v_reset, detach_reset, surrogate, surrogate_scale
struct CallOptions {
  static constexpr int kCount = 5;
  const char* reset;
  double v_reset;
  bool detach_reset;
  const char* surrogate;
  double scale;

  // Whether they are what the ops take.
  bool read(PyObject* const* from) {
    reset = word(from[0]);
    v_reset = number(from[1]);
    detach_reset = from[2] == Py_True;
    surrogate = word(from[3]);
    scale = number(from[4]);
    return reset && surrogate && place(kResets, reset) < std::size(kResets) &&
           place(kSurrogates, surrogate) < std::size(kSurrogates) && std::isfinite(v_reset) && PyBool_Check(from[2]) &&
           std::isfinite(scale) && scale > 0;
  }
};

}  // namespace iirsnn
