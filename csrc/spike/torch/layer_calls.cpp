// The shortest ways from Python to spike layers whose input is known by where it comes from: arguments read in C++, no
// Python in the backward pass. Each returns None for what is left to the twin in Python, which says what is wrong.
#include <ATen/ops/avg_pool2d.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <utility>

#include "lif/torch/call_arguments.h"
#include "spike/torch/average_pool.h"
#include "spike/torch/dense_product.h"

namespace iirsnn::sparse {
namespace {

namespace py = pybind11;

// ---- Arguments ----

bool read(PyObject* value, int64_t& number) {
  if (!PyLong_CheckExact(value)) return false;
  number = PyLong_AsLongLong(value);
  if (number != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// A list or tuple of two numbers, or one number for both.
bool read_pair(PyObject* value, std::vector<int64_t>& pair) {
  pair.resize(2);
  if (read(value, pair[0])) return pair[1] = pair[0], true;
  if (!PyList_CheckExact(value) && !PyTuple_Check(value)) return false;
  if (PySequence_Fast_GET_SIZE(value) != 2) return false;
  PyObject* const* items = PySequence_Fast_ITEMS(value);
  return read(items[0], pair[0]) && read(items[1], pair[1]);
}

bool read_flag(PyObject* value, bool& flag) {
  flag = value == Py_True;
  return PyBool_Check(value);
}

// A tensor that a node made here is right for: no subclass, no transform, no forward mode.
const Tensor* read_tensor(PyObject* value) {
  const Tensor* tensor = plain_tensor(value);
  return tensor != nullptr && !has_tangent(*tensor) ? tensor : nullptr;
}

PyObject* none() { Py_RETURN_NONE; }

// ---- Where a tensor comes from ----

bool is_among(PyObject* names, const std::string& name) {
  const auto found = py::reinterpret_steal<py::object>(PyUnicode_FromStringAndSize(name.data(), name.size()));
  const int among = found ? PySet_Contains(names, found.ptr()) : -1;
  if (among < 0) throw python_error();
  return among;
}

// (most, divisor) of iirsnn.nn.origin.Origin for x; None where nodes beside those named make it.
PyObject* spike_origin(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  enum { kX, kSpikes, kSame, kCount };
  TORCH_CHECK_TYPE(count == kCount, "spike_origin: expected ", int(kCount), " arguments, got ", count);
  const Tensor* x = plain_tensor(arguments[kX]);
  if (x == nullptr || transformed() || !takes("auto", *x) || x->is_inference() || x->_version() != 0) return none();
  if (!x->is_contiguous() && !x->is_non_overlapping_and_dense()) return none();
  NodePointer held = x->grad_fn();
  const Node* node = held.get();
  uint32_t output = x->output_nr();
  int64_t averaged = 1;
  for (; node != nullptr && averaged <= 255;) {
    if (const auto* pool = dynamic_cast<const AveragePool*>(node)) {
      averaged *= pool->options.averaged();
      if (averaged == 0) return none();
    } else {
      const std::string name = node->name();
      if (is_among(arguments[kSpikes], name)) {
        return output == 0 ? py::make_tuple(averaged, averaged).release().ptr() : none();
      }
      if (!is_among(arguments[kSame], name)) return none();
    }
    const torch::autograd::Edge& from = node->next_edge(0);
    node = from.function.get();
    output = from.input_nr;
  }
  return none();
  END_HANDLE_TH_ERRORS
}

// ---- Layers ----

// The output, with `gradient` (a node) as what it comes from, of inputs of which one needs a gradient.
template <typename Run, typename... Inputs>
Tensor with_gradient(Node* gradient, const Run& run, const Inputs&... inputs) {
  const NodePointer node = owned<NodePointer>(gradient);
  node->set_next_edges(edges_of(inputs...));
  Tensor out = [&] {
    const at::NoGradGuard guard;
    return run();
  }();
  torch::autograd::set_history(out, node);
  return out;
}

PyObject* spike_product(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  enum { kX, kWeight, kBias, kMost, kDivisor, kHalf, kKernels, kGeometry, kCount };
  TORCH_CHECK_TYPE(count == kCount, "spike_product: expected ", int(kCount), " arguments, got ", count);
  const Tensor *x = read_tensor(arguments[kX]), *weight = read_tensor(arguments[kWeight]);
  const Tensor* half = plain_tensor(arguments[kHalf]);
  const char* kernels = word(arguments[kKernels]);
  const bool has_bias = arguments[kBias] != Py_None;
  const Tensor* bias = has_bias ? read_tensor(arguments[kBias]) : nullptr;
  Product product{};
  if (!x || !weight || !half || !kernels || (has_bias && !bias) || transformed()) return none();
  if (strcmp(kernels, "auto") == 0 && !takes(kernels, *x)) return none();
  product.triton = strcmp(kernels, "triton") == 0;
  if (!read(arguments[kMost], product.most) || !read(arguments[kDivisor], product.divisor)) return none();
  PyObject* const geometry = arguments[kGeometry];
  if (geometry != Py_None) {
    if (!PyTuple_Check(geometry) || PyTuple_GET_SIZE(geometry) != 4 || x->dim() != 4 || weight->dim() != 4) {
      return none();
    }
    std::vector<int64_t>* const pairs[] = {&product.stride, &product.padding, &product.dilation};
    for (int i = 0; i < 3; ++i) {
      if (!read_pair(PyTuple_GET_ITEM(geometry, i), *pairs[i])) return none();
    }
    if (!read(PyTuple_GET_ITEM(geometry, 3), product.groups)) return none();
  } else if (weight->dim() != 2) {
    return none();
  }
  if (!needs_gradient(*x, *weight, bias ? *bias : Tensor())) return none();
  Tensor out = [&] {
    const py::gil_scoped_release no_gil;
    product.dtype = int64_t(x->scalar_type());
    product.size = x->sizes().vec();
    product.strides = x->strides().vec();
    auto* const gradient = new DenseProduct;
    return with_gradient(
        gradient,
        [&] {
          gradient->kept[DenseProduct::kPacked] = SavedVariable(product.packed(*x, *half), false);
          gradient->kept[DenseProduct::kWeight] = SavedVariable(*weight, false);
          Tensor result = DenseProduct::forward(*x, *weight, bias ? OptionalTensor(*bias) : OptionalTensor(), product);
          gradient->options = std::move(product);
          return result;
        },
        *x, *weight, bias ? *bias : Tensor());
  }();
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyObject* spike_average_pool(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  enum { kX, kKernel, kStride, kPadding, kCeil, kCounted, kDivisor, kCount };
  TORCH_CHECK_TYPE(count == kCount, "spike_average_pool: expected ", int(kCount), " arguments, got ", count);
  const Tensor* x = read_tensor(arguments[kX]);
  Pool pool{};
  if (x == nullptr || x->dim() != 4 || transformed() || !needs_gradient(*x)) return none();
  if (!read_pair(arguments[kKernel], pool.kernel) || !read_pair(arguments[kStride], pool.stride) ||
      !read_pair(arguments[kPadding], pool.padding) || !read_flag(arguments[kCeil], pool.ceil) ||
      !read_flag(arguments[kCounted], pool.counted) ||
      (arguments[kDivisor] != Py_None && (!read(arguments[kDivisor], pool.divisor) || pool.divisor == 0))) {
    return none();
  }
  Tensor out = [&] {
    const py::gil_scoped_release no_gil;
    pool.size = x->sizes().vec();
    pool.channels_last = !x->is_contiguous() && x->is_contiguous(at::MemoryFormat::ChannelsLast);
    auto* const gradient = new AveragePool;
    gradient->options = std::move(pool);
    const Pool& how = gradient->options;
    return with_gradient(
        gradient,
        [&] {
          return at::avg_pool2d(*x, how.kernel, how.stride, how.padding, how.ceil, how.counted, how.divisor_or_none());
        },
        *x);
  }();
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyMethodDef method_of(const char* name, Function* function, const char* text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, text};
}

PyMethodDef methods[] = {
    method_of("spike_origin", &spike_origin,
              "spike_origin(arg0: Tensor, arg1: object, arg2: object) -> object\n\n"
              "The shortest way to iirsnn.nn.origin.origin, which names the nodes."),
    method_of(
        "spike_product", &spike_product,
        "spike_product(arg0: Tensor, arg1: Tensor, arg2: object, arg3: int, arg4: int, arg5: Tensor, arg6: str, arg7: "
        "object) -> object\n\n"
        "The shortest way to a product by torch that keeps spikes packed: see iirsnn.nn.spike_convolution."),
    method_of("spike_average_pool", &spike_average_pool,
              "spike_average_pool(arg0: Tensor, arg1: object, arg2: object, arg3: object, arg4: bool, arg5: bool, "
              "arg6: object) "
              "-> object\n\n"
              "An average pool that keeps nothing of its input: see iirsnn.nn.spike_layers."),
};

}  // namespace

void bind_layer_calls(py::module_& m) {  // the functions spike_*
  for (PyMethodDef& method : methods) m.add_object(method.ml_name, PyCFunction_New(&method, nullptr));
}

}  // namespace iirsnn::sparse
