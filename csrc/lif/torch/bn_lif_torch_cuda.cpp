// Checks and allocation of the bn_lif ops on CUDA tensors; iirsnn/ops/batch_norm.py says what they mean.
#if defined(IIRSNN_WITH_CUDA)

#include <ATen/core/Tensor.h>
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

Tensor empty_floats(const Tensor& x, int64_t count) { return empty_beside(x, count, at::kFloat); }

Tensor empty_sums(const Tensor& x, int64_t sums, int64_t channels) {
  return empty_beside(x, {sums, channels}, {channels, 1}, at::kDouble);
}

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
  BnLifCuda args =
      check_bn_lif<BnLifCuda>(x, mean, rstd, weight, bias, reset, v_reset, detach_reset, surrogate, surrogate_scale);
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
  Tensor sums = empty_sums(x, 2, channels);
  Tensor mean = empty_floats(x, channels), var = empty_floats(x, channels), rstd = empty_floats(x, channels);
  const Tensor workspace = empty_beside(x, bn_lif_moments_workspace_cuda(args.shape), at::kByte);
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
  Tensor grad_s_like = take_grad_s(args, grad_s, x);
  Backward b{args,
             grad_s_like,
             empty_spikes(x, neurons),
             empty_sums(x, kBnLifCudaSums, channels),
             empty_floats(x, channels),
             empty_floats(x, channels),
             empty_floats(x, threshold.numel()),
             empty_floats(x, leak.numel()),
             empty_floats(x, channels),
             empty_floats(x, channels),
             empty_beside(x, bn_lif_workspace_cuda(args.shape), at::kByte)};
  const Tensor counters = zeroed_counters(x, bn_lif_counters_cuda(args.shape));
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
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
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
