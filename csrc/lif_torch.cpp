// Checks, allocation and dispatch of the iirsnn ops. Their schemas are defined in iirsnn/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "lif_cpu.h"

#if defined(IIRSNN_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "lif_cuda.h"
#endif

namespace iirsnn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Names ----

Reset parse_reset(const std::string& name) {
  if (name == "soft") return Reset::soft;
  if (name == "hard") return Reset::hard;
  if (name == "none") return Reset::none;
  TORCH_CHECK_VALUE(name == "soft_delayed", "reset: expected soft, hard, none or soft_delayed, got '", name, "'");
  return Reset::soft_delayed;
}

Surrogate parse_surrogate(const std::string& name) {
  if (name == "triangle") return Surrogate::triangle;
  if (name == "atan") return Surrogate::atan;
  if (name == "sigmoid") return Surrogate::sigmoid;
  if (name == "fast_sigmoid") return Surrogate::fast_sigmoid;
  TORCH_CHECK_VALUE(name == "boxcar", "surrogate: expected triangle, atan, sigmoid, fast_sigmoid or boxcar, got '",
                    name, "'");
  return Surrogate::boxcar;
}

DType parse_dtype(const char* argument, at::ScalarType dtype) {
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

at::ScalarType acc_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// ---- Layout: neurons lie in memory as those of x[0] do, timesteps one after the other ----

std::vector<int64_t> spike_strides(const Tensor& x, int64_t neurons) {
  std::vector<int64_t> strides = x.strides().vec();
  strides[0] = neurons;
  return strides;
}

// Most of the time of writing a large fresh tensor is page faults: ask for 2 MiB pages, 512 times fewer.
Tensor with_huge_pages(Tensor t) {
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

Tensor empty_spikes(const Tensor& x, int64_t neurons) {
  return with_huge_pages(at::empty_strided(x.sizes(), spike_strides(x, neurons), x.options()));
}

Tensor empty_membrane(const Tensor& x, bool wanted) {
  const auto options = x.options().dtype(acc_type(x));
  if (!wanted) return at::empty({0}, options);
  return at::empty_strided(x.sizes().slice(1), x.strides().slice(1), options);
}

// t, or one copy of it, with the given strides; the stride of a dimension of one element says nothing.
Tensor with_strides(const Tensor& t, at::IntArrayRef strides) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides[d]) {
      return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
    }
  }
  return t;
}

// ---- Checks ----

LifShape check_x(const Tensor& x) {
  LifShape shape{};
  shape.dtype = parse_dtype("x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) >= 1, "x: expected shape [T, *neurons] with T >= 1, got ", x.sizes());
  const Tensor first = x.select(0, 0);
  shape.timesteps = x.size(0);
  shape.neurons = first.numel();
  shape.x_stride_t = x.stride(0);
  const bool apart = shape.timesteps == 1 || shape.x_stride_t == 0 || shape.x_stride_t >= shape.neurons;
  TORCH_CHECK_VALUE(shape.neurons == 0 || (first.is_non_overlapping_and_dense() && apart),
                    "x: expected x[0] dense and timesteps that do not overlap, got sizes ", x.sizes(), " strides ",
                    x.strides());
  shape.channels = 1;
  shape.inner = std::max<int64_t>(shape.neurons, 1);
  return shape;
}

void check_parameter(const char* name, const Tensor& value, const Tensor& x, LifShape& shape) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": expected device ", x.device(), ", got ", value.device());
  TORCH_CHECK_TYPE(value.scalar_type() == acc_type(x), name, ": expected ", acc_type(x), " for x of ", x.scalar_type(),
                   ", got ", value.scalar_type());
  const bool per_channel = value.dim() == 1 && x.dim() >= 3 && value.numel() == x.size(2);
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
std::pair<Tensor, Tensor> check_parameters(const Tensor& threshold, const Tensor& leak, const Tensor& x,
                                           LifShape& shape) {
  check_parameter("threshold", threshold, x, shape);
  check_parameter("leak", leak, x, shape);
  const auto spread = [&](const Tensor& value) { return value.expand({shape.channels}).contiguous(); };
  std::pair<Tensor, Tensor> both{spread(threshold), spread(leak)};
  if (x.is_cpu()) {  // on a GPU, looking at values would wait for it
    check_each("threshold", both.first, "finite values > 0", [](double n) { return n > 0 && std::isfinite(n); });
    check_each("leak", both.second, "finite values", [](double n) { return std::isfinite(n); });
  }
  return both;
}

OptionalTensor check_membrane(const char* name, const OptionalTensor& v, const Tensor& x) {
  if (!v) return v;
  TORCH_CHECK_VALUE(v->device() == x.device(), name, ": expected device ", x.device(), ", got ", v->device());
  TORCH_CHECK_TYPE(v->scalar_type() == acc_type(x), name, ": expected ", acc_type(x), " for x of ", x.scalar_type(),
                   ", got ", v->scalar_type());
  TORCH_CHECK_VALUE(v->sizes() == x.sizes().slice(1), name, ": expected shape ", x.sizes().slice(1), ", got ",
                    v->sizes());
  return with_strides(*v, x.strides().slice(1));
}

// grad_s in the layout of the spikes; timestep stride N, or 0 where every timestep has the same gradient.
Tensor check_grad_s(const Tensor& grad_s, const Tensor& x, int64_t neurons) {
  TORCH_CHECK_VALUE(grad_s.device() == x.device(), "grad_s: expected device ", x.device(), ", got ", grad_s.device());
  TORCH_CHECK_TYPE(grad_s.scalar_type() == x.scalar_type(), "grad_s: expected ", x.scalar_type(), ", got ",
                   grad_s.scalar_type());
  TORCH_CHECK_VALUE(grad_s.sizes() == x.sizes(), "grad_s: expected shape ", x.sizes(), ", got ", grad_s.sizes());
  if (grad_s.size(0) > 1 && grad_s.stride(0) == 0) {
    return with_strides(grad_s.select(0, 0), x.strides().slice(1)).unsqueeze(0).expand(x.sizes());
  }
  return with_strides(grad_s, spike_strides(x, neurons));
}

const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// ---- Ops ----

#if defined(IIRSNN_WITH_CUDA)
void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#define IIRSNN_ON_CUDA(tensor)                                                                                     \
  const c10::cuda::OptionalCUDAGuard guard(tensor.is_cuda() ? std::make_optional(tensor.device()) : std::nullopt); \
  if (tensor.is_cuda())
#endif

void run_forward(const Tensor& x, const LifForward& args) {
#if defined(IIRSNN_WITH_CUDA)
  IIRSNN_ON_CUDA(x) return lif_forward_cuda(args, current_stream());
#endif
  std::atomic<bool> nan = false;
  at::parallel_for(0, lif_chunks_cpu(args.shape), 1, [&](int64_t first, int64_t last) {
    if (lif_forward_cpu(args, first, last)) nan = true;
  });
  TORCH_CHECK_VALUE(!nan, "packed: expected a current without NaN, got NaN (a bit cannot hold it)");
}

std::tuple<Tensor, Tensor> lif_forward(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                       const OptionalTensor& v0, std::string reset, double v_reset, bool,
                                       std::string surrogate, double, bool return_v) {
  LifForward args{};
  args.shape = check_x(x);
  args.reset = parse_reset(reset);
  parse_surrogate(surrogate);
  args.v_reset = v_reset;
  const auto [threshold_c, leak_c] = check_parameters(threshold, leak, x, args.shape);
  const OptionalTensor v0_like = check_membrane("v0", v0, x);
  Tensor s = empty_spikes(x, args.shape.neurons), v = empty_membrane(x, return_v);
  if (args.shape.neurons == 0) return {s, v};
  args.x = x.const_data_ptr();
  args.threshold = threshold_c.const_data_ptr();
  args.leak = leak_c.const_data_ptr();
  args.v0 = pointer(v0_like);
  args.s = s.mutable_data_ptr();
  args.v = return_v ? v.mutable_data_ptr() : nullptr;
  run_forward(x, args);
  return {s, v};
}

std::tuple<Tensor, Tensor> lif_packed(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                      const OptionalTensor& v0, std::string reset, double v_reset, bool return_v) {
  LifForward args{};
  args.shape = check_x(x);
  args.reset = parse_reset(reset);
  args.v_reset = v_reset;
  const auto [threshold_c, leak_c] = check_parameters(threshold, leak, x, args.shape);
  const OptionalTensor v0_like = check_membrane("v0", v0, x);
  Tensor bits = at::empty({x.size(0), packed_bytes(args.shape.neurons)}, x.options().dtype(at::kByte));
  Tensor v = empty_membrane(x, return_v);
  if (args.shape.neurons == 0) return {bits, v};
  args.x = x.const_data_ptr();
  args.threshold = threshold_c.const_data_ptr();
  args.leak = leak_c.const_data_ptr();
  args.v0 = pointer(v0_like);
  args.bits = bits.mutable_data_ptr<uint8_t>();
  args.v = return_v ? v.mutable_data_ptr() : nullptr;
  run_forward(x, args);
  return {bits, v};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_backward(const Tensor& grad_s, const OptionalTensor& grad_v,
                                                        const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                                        const OptionalTensor& v0, std::string reset, double v_reset,
                                                        bool detach_reset, std::string surrogate,
                                                        double surrogate_scale, bool need_parameter_grads) {
  LifBackward args{};
  args.shape = check_x(x);
  args.reset = parse_reset(reset);
  args.v_reset = v_reset;
  args.detach_reset = detach_reset;
  args.surrogate = parse_surrogate(surrogate);
  args.surrogate_scale = surrogate_scale;
  const auto [threshold_c, leak_c] = check_parameters(threshold, leak, x, args.shape);
  const OptionalTensor v0_like = check_membrane("v0", v0, x), grad_v_like = check_membrane("grad_v", grad_v, x);
  const Tensor grad_s_like = check_grad_s(grad_s, x, args.shape.neurons);

  const int64_t channels = need_parameter_grads ? args.shape.channels : 0;
  Tensor grad_x = empty_spikes(x, args.shape.neurons), grad_v0 = empty_membrane(x, v0.has_value());
  Tensor grad_threshold = at::empty({channels}, threshold.options()), grad_leak = at::empty({channels}, leak.options());
  if (args.shape.neurons == 0) return {grad_x, grad_threshold.zero_(), grad_leak.zero_(), grad_v0};

  args.grad_s = grad_s_like.const_data_ptr();
  args.grad_s_stride_t = x.size(0) > 1 && grad_s_like.stride(0) == 0 ? 0 : args.shape.neurons;
  args.grad_v = pointer(grad_v_like);
  args.x = x.const_data_ptr();
  args.threshold = threshold_c.const_data_ptr();
  args.leak = leak_c.const_data_ptr();
  args.v0 = pointer(v0_like);
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_threshold = need_parameter_grads ? grad_threshold.mutable_data_ptr() : nullptr;
  args.grad_leak = need_parameter_grads ? grad_leak.mutable_data_ptr() : nullptr;
  args.grad_v0 = v0 ? grad_v0.mutable_data_ptr() : nullptr;

  const auto workspace = [&](int64_t bytes) {
    Tensor memory = at::empty({bytes}, x.options().dtype(at::kByte));
    args.workspace = memory.mutable_data_ptr();
    return memory;
  };
  const auto on_cpu = [&] {
    const Tensor memory = workspace(lif_backward_workspace_cpu(args));
    at::parallel_for(0, lif_chunks_cpu(args.shape), 1,
                     [&](int64_t first, int64_t last) { lif_backward_cpu(args, first, last); });
    if (need_parameter_grads) lif_backward_finish_cpu(args);
  };
#if defined(IIRSNN_WITH_CUDA)
  IIRSNN_ON_CUDA(x) {
    const Tensor memory = workspace(lif_backward_workspace_cuda(args));
    lif_backward_cuda(args, current_stream());
  }
  else {
    on_cpu();
  }
#else
  on_cpu();
#endif
  // a scalar beside a per-channel parameter acts on every channel
  if (threshold.numel() < channels) grad_threshold = grad_threshold.sum(0, true);
  if (leak.numel() < channels) grad_leak = grad_leak.sum(0, true);
  return {grad_x, grad_threshold, grad_leak, grad_v0};
}

Tensor unpack_spikes(const Tensor& bits, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const DType type = parse_dtype("dtype", dtype);
  TORCH_CHECK_VALUE(!size.empty() && size.size() == stride.size(),
                    "size, stride: expected one entry a dimension of [T, "
                    "*neurons], got ",
                    size, " and ", stride);
  Tensor s = at::empty_strided(size, stride, bits.options().dtype(dtype));
  const int64_t timesteps = size[0], neurons = c10::multiply_integers(size.slice(1));
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.dim() == 2 && bits.size(0) == timesteps &&
                        bits.size(1) == packed_bytes(neurons),
                    "bits: expected uint8 [", timesteps, ", ", packed_bytes(neurons), "] for spikes ", size, ", got ",
                    bits.scalar_type(), " ", bits.sizes());
  if (s.numel() == 0) return s;
  TORCH_CHECK_VALUE(s.select(0, 0).is_non_overlapping_and_dense() && (timesteps == 1 || stride[0] == neurons),
                    "stride: expected dense timesteps, time outermost, got ", stride, " for size ", size);
  const Tensor dense = bits.contiguous();
  const uint8_t* from = dense.const_data_ptr<uint8_t>();
#if defined(IIRSNN_WITH_CUDA)
  IIRSNN_ON_CUDA(bits) {
    unpack_spikes_cuda(from, s.mutable_data_ptr(), type, timesteps, neurons, current_stream());
    return s;
  }
#endif
  at::parallel_for(0, timesteps, 1, [&](int64_t first, int64_t last) {
    unpack_spikes_cpu(from, s.mutable_data_ptr(), type, neurons, first, last);
  });
  return s;
}

void implement(torch::Library& m) {
  m.impl("lif_forward", &lif_forward);
  m.impl("lif_backward", &lif_backward);
  m.impl("lif_packed", &lif_packed);
  m.impl("unpack_spikes", &unpack_spikes);
}

TORCH_LIBRARY_IMPL(iirsnn, CPU, m) { implement(m); }
#if defined(IIRSNN_WITH_CUDA)
TORCH_LIBRARY_IMPL(iirsnn, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace iirsnn
