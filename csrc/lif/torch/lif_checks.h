// Names, layouts and checks that the ops on torch's tensors share.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#if defined(IIRSNN_WITH_CUDA)
#include <ATen/cuda/EmptyTensor.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <string_view>
#include <utility>

#include "lif/lif.h"

namespace iirsnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Names ----

constexpr const char* kResets[] = {"soft", "hard", "none", "soft_delayed"};
constexpr const char* kSurrogates[] = {"triangle", "atan", "sigmoid", "fast_sigmoid", "boxcar"};
static_assert(int(Reset::soft_delayed) == 3 && int(Surrogate::boxcar) == 4);

// Where the name stands, or their number.
template <size_t kCount>
size_t place(const char* const (&names)[kCount], std::string_view name) {
  return std::find(names, names + kCount, name) - names;
}

inline Reset parse_reset(std::string_view name) {
  const size_t found = place(kResets, name);
  TORCH_CHECK_VALUE(found < std::size(kResets), "reset: expected soft, hard, none or soft_delayed, got '", name, "'");
  return Reset(found);
}

inline Surrogate parse_surrogate(std::string_view name) {
  const size_t found = place(kSurrogates, name);
  TORCH_CHECK_VALUE(found < std::size(kSurrogates),
                    "surrogate: expected triangle, atan, sigmoid, fast_sigmoid or boxcar, got '", name, "'");
  return Surrogate(found);
}

inline DType parse_dtype(const char* argument, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, argument, ": expected float32, float64, float16 or bfloat16, got ", dtype);
  }
}

inline at::ScalarType acc_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// ---- Layout: neurons lie in memory as those of x[0] do, timesteps one after the other ----

inline at::DimVector spike_strides(const Tensor& x, int64_t neurons) {
  at::DimVector strides(x.strides());
  strides[0] = neurons;
  return strides;
}

// Most of the time of writing a large fresh tensor is page faults: ask for 2 MiB pages, 512 times fewer.
inline Tensor with_huge_pages(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (t.is_cpu() && t.nbytes() >= 2 * kPage) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + t.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failing changes nothing
  }
#endif
  return t;
}

// Where x is. The dispatcher, which is not needed here, costs small tensors more than the kernel does.
inline Tensor empty_beside(const Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  if (x.is_cpu()) return at::detail::empty_strided_cpu(sizes, strides, dtype);
#if defined(IIRSNN_WITH_CUDA)
  if (x.is_cuda()) return Tensor(at::detail::empty_strided_cuda(sizes, strides, dtype, x.device()));
#endif
  return at::empty_strided(sizes, strides, x.options().dtype(dtype));
}
inline Tensor empty_beside(const Tensor& x, int64_t size, at::ScalarType dtype) {
  if (x.is_cpu()) return at::detail::empty_cpu({size}, dtype);
  return empty_beside(x, {size}, {1}, dtype);
}

inline Tensor empty_spikes(const Tensor& x, int64_t neurons) {
  return with_huge_pages(empty_beside(x, x.sizes(), spike_strides(x, neurons), x.scalar_type()));
}

// t, or one copy of it, with the given strides; the stride of a dimension of one element says nothing.
inline Tensor with_strides(const Tensor& t, at::IntArrayRef strides) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides[d]) {
      return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
    }
  }
  return t;
}

// ---- Checks ----

// Whether elements lie side by side in some order of the dimensions; a tensor of them, to be asked, would cost more.
inline bool is_filled(at::IntArrayRef sizes, at::IntArrayRef strides) {
  const int64_t elements = c10::multiply_integers(sizes);
  if (elements <= 1) return true;
  int64_t inner = 1;
  for (bool found = true; found && inner < elements;) {
    found = false;
    for (size_t d = 0; d < sizes.size() && !found; ++d) {
      found = sizes[d] != 1 && strides[d] == inner;
      if (found) inner *= sizes[d];
    }
  }
  return inner == elements;
}

// Whether timesteps have no holes and do not overlap, as the kernels read them.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const int64_t neurons = c10::multiply_integers(x.sizes().slice(1));
  const bool apart = x.size(0) == 1 || x.stride(0) == 0 || x.stride(0) >= neurons;
  return apart && is_filled(x.sizes().slice(1), x.strides().slice(1));
}

inline LifShape check_x(const Tensor& x) {
  LifShape shape{};
  shape.dtype = parse_dtype("x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) >= 1, "x: expected shape [T, *neurons] with T >= 1, got ", x.sizes());
  shape.timesteps = x.size(0);
  shape.neurons = c10::multiply_integers(x.sizes().slice(1));
  shape.x_stride_t = x.stride(0);
  TORCH_CHECK_VALUE(shape.neurons == 0 || is_dense(x),
                    "x: expected x[0] dense and timesteps that do not overlap, got sizes ", x.sizes(), " strides ",
                    x.strides());
  shape.channels = 1;
  shape.inner = std::max<int64_t>(shape.neurons, 1);
  return shape;
}

inline void check_parameter(const char* name, const Tensor& value, const Tensor& x, LifShape& shape) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": expected device ", x.device(), ", got ", value.device());
  TORCH_CHECK_TYPE(value.scalar_type() == acc_type(x), name, ": expected ", acc_type(x), " for x of ", x.scalar_type(),
                   ", got ", value.scalar_type());
  const bool per_channel = value.numel() > 0 && x.dim() >= 3 && value.numel() == x.size(2);
  TORCH_CHECK_VALUE(value.dim() == 1 && (value.numel() == 1 || per_channel), name,
                    ": expected 1-D with 1 element, or C for x [T, B, C, ...], got ", value.sizes(), " for x ",
                    x.sizes());
  if (value.numel() > 1) {
    shape.channels = x.size(2);
    shape.inner = x.stride(2);
  }
}

template <typename F>
void check_each(const char* name, const Tensor& value, const char* expected, F good) {
  for (int64_t i = 0; i < value.numel(); ++i) {
    const double number = value.scalar_type() == at::kDouble ? value.const_data_ptr<double>()[i]
                                                             : double(value.const_data_ptr<float>()[i]);
    TORCH_CHECK_VALUE(good(number), name, ": expected ", expected, ", got ", number, " at element ", i);
  }
}

// threshold and leak as the kernels read them, both [channels], after their checks.
inline std::pair<Tensor, Tensor> check_parameters(const Tensor& threshold, const Tensor& leak, const Tensor& x,
                                                  LifShape& shape) {
  check_parameter("threshold", threshold, x, shape);
  check_parameter("leak", leak, x, shape);
  const auto spread = [&](const Tensor& value) {
    if (value.numel() == shape.channels && value.is_contiguous()) return value;
    if (!x.is_cpu() || value.numel() > 1) return value.expand({shape.channels}).contiguous();
    Tensor all = empty_beside(x, shape.channels, value.scalar_type());  // by hand: see empty_beside
    if (value.scalar_type() == at::kDouble) {
      std::fill_n(all.mutable_data_ptr<double>(), shape.channels, *value.const_data_ptr<double>());
    } else {
      std::fill_n(all.mutable_data_ptr<float>(), shape.channels, *value.const_data_ptr<float>());
    }
    return all;
  };
  std::pair<Tensor, Tensor> both{spread(threshold), spread(leak)};
  if (x.is_cpu()) {  // on a GPU, looking at values would wait for it
    check_each("threshold", both.first, "finite values > 0", [](double n) { return n > 0 && std::isfinite(n); });
    check_each("leak", both.second, "finite values", [](double n) { return std::isfinite(n); });
  }
  return both;
}

// grad_s in the layout of the spikes; timestep stride N, or 0 where every timestep has the same gradient.
inline Tensor check_grad_s(const Tensor& grad_s, const Tensor& x, int64_t neurons) {
  TORCH_CHECK_VALUE(grad_s.device() == x.device(), "grad_s: expected device ", x.device(), ", got ", grad_s.device());
  TORCH_CHECK_TYPE(grad_s.scalar_type() == x.scalar_type(), "grad_s: expected ", x.scalar_type(), ", got ",
                   grad_s.scalar_type());
  TORCH_CHECK_VALUE(grad_s.sizes() == x.sizes(), "grad_s: expected shape ", x.sizes(), ", got ", grad_s.sizes());
  if (grad_s.size(0) > 1 && grad_s.stride(0) == 0) {
    return with_strides(grad_s.select(0, 0), x.strides().slice(1)).unsqueeze(0).expand(x.sizes());
  }
  return with_strides(grad_s, spike_strides(x, neurons));
}

// ---- What calls have in common; the tensors that come back own what the pointers are to ----

template <typename Call>
Tensor take_grad_s(Call& call, const Tensor& grad_s, const Tensor& x) {
  const int64_t neurons = call.shape.neurons;
  Tensor like = check_grad_s(grad_s, x, neurons);
  call.grad_s = like.const_data_ptr();
  call.grad_s_stride_t = x.size(0) > 1 && like.stride(0) == 0 ? 0 : neurons;
  return like;
}

template <typename Call>
void take_surrogate(Call& call, bool detach_reset, std::string_view surrogate, double scale) {
  call.detach_reset = detach_reset;
  call.surrogate = parse_surrogate(surrogate);
  call.surrogate_scale = scale;
}

}  // namespace iirsnn
