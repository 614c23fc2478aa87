// Checks and allocation of the bn_lif ops on CUDA tensors; iirsnn/ops/batch_norm.py says what they mean.
#if defined(IIRSNN_WITH_CUDA)

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "lif/cuda/bn_lif_cuda.h"
#include "lif/torch/bn_lif_checks.h"
#include "lif/torch/counters.h"

namespace iirsnn {
namespace {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

Tensor empty_bytes(const Tensor& x, int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); }

Tensor empty_floats(const Tensor& x, int64_t count) { return at::empty({count}, x.options().dtype(at::kFloat)); }

const float* check_parameter_of(const char* name, const Tensor& value, const Tensor& x, bool& one) {
  LifShape shape{};
  check_parameter(name, value, x, shape);
  TORCH_CHECK_VALUE(value.is_contiguous(), name, ": expected a contiguous tensor, got strides ", value.strides());
  one = value.numel() == 1;
  return value.const_data_ptr<float>();
}

// Everything that reads the normalised current has these arguments.
BnLifCuda check_call(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, const std::string& reset,
                     double v_reset, bool detach_reset, const std::string& surrogate, double surrogate_scale) {
  BnLifCuda args{};
  args.shape = check_bn_lif_x(x);
  args.reset = parse_reset(reset);
  args.v_reset = v_reset;
  args.detach_reset = detach_reset;
  args.surrogate = parse_surrogate(surrogate);
  args.surrogate_scale = surrogate_scale;
  args.x = x.const_data_ptr();
  args.mean = check_channels("mean", mean, x);
  args.rstd = check_channels("rstd", rstd, x);
  args.weight = weight ? check_channels("weight", *weight, x) : nullptr;
  args.bias = bias ? check_channels("bias", *bias, x) : nullptr;
  args.threshold = check_parameter_of("threshold", threshold, x, args.one_threshold);
  args.leak = check_parameter_of("leak", leak, x, args.one_leak);
  return args;
}

// -> sums [2, C], mean, var, rstd
std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  BnLifMoments args{};
  args.shape = check_bn_lif_x(x);
  args.eps = eps;
  args.x = x.const_data_ptr();
  const int64_t channels = x.size(2);
  Tensor sums = at::empty({2, channels}, x.options().dtype(at::kDouble));
  Tensor mean = empty_floats(x, channels), var = empty_floats(x, channels), rstd = empty_floats(x, channels);
  const Tensor workspace = empty_bytes(x, bn_lif_moments_workspace_cuda(args.shape));
  const Tensor counters = zeroed_counters(x, bn_lif_counters_cuda(args.shape));
  args.sums = sums.mutable_data_ptr<double>();
  args.mean = mean.mutable_data_ptr<float>();
  args.var = var.mutable_data_ptr<float>();
  args.rstd = rstd.mutable_data_ptr<float>();
  args.workspace = workspace.mutable_data_ptr();
  args.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int>());
  bn_lif_moments_cuda(args, current_stream());
  return {sums, mean, var, rstd};
}

Tensor fire(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
            const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, std::string reset, double v_reset,
            bool detach_reset, std::string surrogate, double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  Tensor s = empty_spikes(x, args.shape.neurons);
  args.s = s.mutable_data_ptr();
  bn_lif_fire_cuda(args, current_stream());
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& threshold,
                                                   const Tensor& leak, double eps, std::string reset, double v_reset,
                                                   bool detach_reset, std::string surrogate, double surrogate_scale) {
  const auto [sums, mean, var, rstd] = moments(x, eps);
  return {fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate, surrogate_scale),
          mean, var, rstd};
}

// The first pass backward: all that it writes, and what the second one reads.
struct Backward {
  BnLifCuda args;
  Tensor grad_s, grad_x, sums, grad_weight, grad_bias, grad_threshold, grad_leak, grad_mean, slope, workspace;
};

Backward sum_gradients(BnLifCuda args, const Tensor& grad_s, const Tensor& x, const Tensor& threshold,
                       const Tensor& leak) {
  const int64_t channels = x.size(2), neurons = args.shape.neurons;
  Backward b{args,
             check_grad_s(grad_s, x, neurons),
             empty_spikes(x, neurons),
             at::empty({kBnLifCudaSums, channels}, x.options().dtype(at::kDouble)),
             empty_floats(x, channels),
             empty_floats(x, channels),
             empty_floats(x, threshold.numel()),
             empty_floats(x, leak.numel()),
             empty_floats(x, channels),
             empty_floats(x, channels),
             empty_bytes(x, bn_lif_workspace_cuda(args.shape))};
  const Tensor counters = zeroed_counters(x, bn_lif_counters_cuda(args.shape));
  b.args.grad_s = b.grad_s.const_data_ptr();
  b.args.grad_s_stride_t = x.size(0) > 1 && b.grad_s.stride(0) == 0 ? 0 : neurons;
  b.args.sums = b.sums.mutable_data_ptr<double>();
  b.args.grad_weight = b.grad_weight.mutable_data_ptr<float>();
  b.args.grad_bias = b.grad_bias.mutable_data_ptr<float>();
  b.args.grad_threshold = b.grad_threshold.mutable_data_ptr<float>();
  b.args.grad_leak = b.grad_leak.mutable_data_ptr<float>();
  b.args.grad_mean = b.grad_mean.mutable_data_ptr<float>();
  b.args.slope = b.slope.mutable_data_ptr<float>();
  b.args.grad_x = b.grad_x.mutable_data_ptr();
  b.args.workspace = b.workspace.mutable_data_ptr();
  b.args.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int>());
  bn_lif_sums_cuda(b.args, current_stream());
  return b;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, std::string reset, double v_reset,
                                                            bool detach_reset, std::string surrogate,
                                                            double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset,
                                    surrogate, surrogate_scale);
  const Backward b = sum_gradients(args, grad_s, x, threshold, leak);
  bn_lif_grad_x_cuda(b.args, current_stream());
  return {b.grad_x, b.grad_weight, b.grad_bias, b.grad_threshold, b.grad_leak};
}

// The same for many processes, which add up their sums between the two passes.
std::tuple<Tensor, Tensor, Tensor> gradient_sums(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& threshold,
                                                 const Tensor& leak, std::string reset, double v_reset,
                                                 bool detach_reset, std::string surrogate, double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset,
                                    surrogate, surrogate_scale);
  const Backward b = sum_gradients(args, grad_s, x, threshold, leak);
  return {b.grad_x, b.sums, b.workspace};
}

void grad_x(const Tensor& grad_x, const Tensor& workspace, const Tensor& grad_mean, const Tensor& slope,
            const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
            const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, std::string reset, double v_reset,
            bool detach_reset, std::string surrogate, double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  const Tensor grad_s_like = check_grad_s(grad_s, x, args.shape.neurons);
  args.grad_s = grad_s_like.const_data_ptr();
  args.grad_s_stride_t = x.size(0) > 1 && grad_s_like.stride(0) == 0 ? 0 : args.shape.neurons;
  args.grad_mean = const_cast<float*>(check_channels("grad_mean", grad_mean, x));
  args.slope = const_cast<float*>(check_channels("slope", slope, x));
  args.grad_x = grad_x.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  bn_lif_grad_x_cuda(args, current_stream());
}

TORCH_LIBRARY_IMPL(iirsnn, CUDA, m) {
  m.impl("bn_lif_forward", &forward);
  m.impl("bn_lif_backward", &backward);
  m.impl("bn_lif_moments", &moments);
  m.impl("bn_lif_fire", &fire);
  m.impl("bn_lif_gradient_sums", &gradient_sums);
  m.impl("bn_lif_grad_x", &grad_x);
}

}  // namespace
}  // namespace iirsnn

#endif
