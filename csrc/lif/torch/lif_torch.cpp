// Checks, allocation and dispatch of the iirsnn ops. Their schemas are in lif_autograd.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lif/cpu/lif_cpu.h"
#include "lif/torch/chunks.h"
#include "lif/torch/lif_checks.h"
#include "lif/torch/lif_ops.h"

#if defined(IIRSNN_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "lif/cuda/lif_cuda.h"
#include "lif/torch/counters.h"
#endif

namespace iirsnn {
namespace {

// ---- Membranes ----

Tensor empty_membrane(const Tensor& x) {
  return empty_beside(x, x.sizes().slice(1), x.strides().slice(1), acc_type(x));
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

const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// What owns the memory that a call points to.
struct Inputs {
  Tensor threshold, leak;
  OptionalTensor v0;
};

// What forward and backward are given alike.
template <typename Call>
Inputs take_inputs(Call& call, const Tensor& x, const Tensor& threshold, const Tensor& leak, const OptionalTensor& v0,
                   const std::string& reset, double v_reset) {
  call.shape = check_x(x);
  call.reset = parse_reset(reset);
  call.v_reset = v_reset;
  auto [threshold_c, leak_c] = check_parameters(threshold, leak, x, call.shape);
  Inputs held{std::move(threshold_c), std::move(leak_c), check_membrane("v0", v0, x)};
  call.x = x.const_data_ptr();
  call.threshold = held.threshold.const_data_ptr();
  call.leak = held.leak.const_data_ptr();
  call.v0 = pointer(held.v0);
  return held;
}

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
  for_chunks(args.shape, [&](int64_t first, int64_t last) {
    if (lif_forward_cpu(args, first, last)) nan = true;
  });
  TORCH_CHECK_VALUE(!nan, "packed: expected a current without NaN, got NaN (a bit cannot hold it)");
}

}  // namespace

std::tuple<Tensor, Tensor> lif_forward(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                       const OptionalTensor& v0, std::string reset, double v_reset, bool,
                                       std::string surrogate, double, bool return_v) {
  LifForward args{};
  parse_surrogate(surrogate);
  const Inputs held = take_inputs(args, x, threshold, leak, v0, reset, v_reset);
  Tensor s = empty_spikes(x, args.shape.neurons), v;
  if (return_v) v = empty_membrane(x);
  if (args.shape.neurons == 0) return {std::move(s), std::move(v)};
  args.s = s.mutable_data_ptr();
  args.v = return_v ? v.mutable_data_ptr() : nullptr;
  run_forward(x, args);
  return {std::move(s), std::move(v)};
}

namespace {

std::tuple<Tensor, Tensor> lif_packed(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                      const OptionalTensor& v0, std::string reset, double v_reset, bool return_v) {
  LifForward args{};
  const Inputs held = take_inputs(args, x, threshold, leak, v0, reset, v_reset);
  const int64_t bytes = packed_bytes(args.shape.neurons);
  Tensor bits = empty_beside(x, {x.size(0), bytes}, {bytes, 1}, at::kByte);
  Tensor v = return_v ? empty_membrane(x) : empty_beside(x, 0, acc_type(x));
  if (args.shape.neurons == 0) return {bits, v};
  args.bits = bits.mutable_data_ptr<uint8_t>();
  args.v = return_v ? v.mutable_data_ptr() : nullptr;
  run_forward(x, args);
  return {bits, v};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_backward(const Tensor& grad_s, const OptionalTensor& grad_v,
                                                        const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                                        const OptionalTensor& v0, std::string reset, double v_reset,
                                                        bool detach_reset, std::string surrogate,
                                                        double surrogate_scale, bool need_parameter_grads) {
  LifBackward args{};
  take_surrogate(args, detach_reset, surrogate, surrogate_scale);
  const Inputs held = take_inputs(args, x, threshold, leak, v0, reset, v_reset);
  const OptionalTensor grad_v_like = check_membrane("grad_v", grad_v, x);
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);

  const int64_t channels = args.shape.channels;
  Tensor grad_x = empty_spikes(x, args.shape.neurons), grad_v0, grad_threshold, grad_leak;
  if (v0) grad_v0 = empty_membrane(x);
  if (need_parameter_grads) {
    grad_threshold = empty_beside(x, channels, acc_type(x));
    grad_leak = empty_beside(x, channels, acc_type(x));
  }
  if (args.shape.neurons == 0) {
    if (need_parameter_grads) grad_threshold.zero_(), grad_leak.zero_();
    return {grad_x, grad_threshold, grad_leak, grad_v0};
  }

  args.grad_v = pointer(grad_v_like);
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_threshold = need_parameter_grads ? grad_threshold.mutable_data_ptr() : nullptr;
  args.grad_leak = need_parameter_grads ? grad_leak.mutable_data_ptr() : nullptr;
  args.grad_v0 = v0 ? grad_v0.mutable_data_ptr() : nullptr;

  const auto on_cpu = [&] {
    double few[16];  // a tensor costs small calls more than what is to be kept in it
    const int64_t bytes = lif_backward_workspace_cpu(args);
    const Tensor many = bytes > int64_t(sizeof(few)) ? empty_beside(x, bytes, at::kByte) : Tensor();
    args.workspace = many.defined() ? many.mutable_data_ptr() : few;
    for_chunks(args.shape, [&](int64_t first, int64_t last) { lif_backward_cpu(args, first, last); });
    if (need_parameter_grads) lif_backward_finish_cpu(args);
  };
#if defined(IIRSNN_WITH_CUDA)
  IIRSNN_ON_CUDA(x) {
    const Tensor memory = empty_beside(x, lif_backward_workspace_cuda(args), at::kByte);
    args.workspace = memory.mutable_data_ptr();
    const Tensor counters = zeroed_counters(x, need_parameter_grads ? lif_backward_counters_cuda(args) : 0);
    args.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int>());
    lif_backward_cuda(args, current_stream());
  }
  else {
    on_cpu();
  }
#else
  on_cpu();
#endif
  // a scalar beside a per-channel parameter acts on every channel
  if (need_parameter_grads && threshold.numel() < channels) grad_threshold = grad_threshold.sum(0, true);
  if (need_parameter_grads && leak.numel() < channels) grad_leak = grad_leak.sum(0, true);
  return {std::move(grad_x), std::move(grad_threshold), std::move(grad_leak), std::move(grad_v0)};
}

namespace {

Tensor unpack_spikes(const Tensor& bits, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const DType type = parse_dtype("dtype", dtype);
  TORCH_CHECK_VALUE(!size.empty() && size.size() == stride.size(),
                    "size, stride: expected one entry a dimension of [T, "
                    "*neurons], got ",
                    size, " and ", stride);
  Tensor s = empty_beside(bits, size, stride, dtype);
  const int64_t timesteps = size[0], neurons = c10::multiply_integers(size.slice(1));
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.dim() == 2 && bits.size(0) == timesteps &&
                        bits.size(1) == packed_bytes(neurons),
                    "bits: expected uint8 [", timesteps, ", ", packed_bytes(neurons), "] for spikes ", size, ", got ",
                    bits.scalar_type(), " ", bits.sizes());
  if (s.numel() == 0) return s;
  TORCH_CHECK_VALUE(is_filled(size.slice(1), stride.slice(1)) && (timesteps == 1 || stride[0] == neurons),
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

// What was not wanted is undefined; an op returns tensors, of no elements.
template <auto f, typename Signature>
struct Op;
template <auto f, typename Result, typename... Arguments>
struct Op<f, Result(const Tensor&, Arguments...)> {
  static Result call(const Tensor& like, Arguments... arguments) {
    Result found = f(like, std::forward<Arguments>(arguments)...);
    const auto define = [&](Tensor& t) {
      if (!t.defined()) t = empty_beside(like, 0, acc_type(like));
    };
    std::apply([&](auto&... all) { (define(all), ...); }, found);
    return found;
  }
};

void implement(torch::Library& m) {
  m.impl("lif_forward", &Op<&lif_forward, ForwardSignature>::call);
  m.impl("lif_backward", &Op<&lif_backward, BackwardSignature>::call);
  m.impl("lif_packed", &lif_packed);
  m.impl("unpack_spikes", &unpack_spikes);
}

TORCH_LIBRARY_IMPL(iirsnn, CPU, m) { implement(m); }
#if defined(IIRSNN_WITH_CUDA)
TORCH_LIBRARY_IMPL(iirsnn, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace iirsnn
