// Checks and allocation of the bn_lif ops on CUDA tensors; iirsnn/ops/batch_norm.py says what they mean.
// An allocation costs small tensors as much as a launch does: what is not returned shares one.
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
#include "lif/torch/bn_lif_ops.h"
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

constexpr int64_t kAligned = 256;  // bytes, as torch's allocator gives them
int64_t aligned(int64_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

struct Statistics {
  Tensor mean, var, rstd;
};

BnLifRunning pointers(const Running& running) {
  return {running.mean.mutable_data_ptr<float>(), running.var.mutable_data_ptr<float>(),
          running.calls.mutable_data_ptr<int64_t>(), running.momentum};
}

// Of x; sums [2, C] of it and of its square go to `sums`, or where null are not kept; running: or null.
Statistics statistics(const Tensor& x, double eps, double* sums, const Running* running = nullptr) {
  BnLifMoments args{};
  if (running) args.running = pointers(*running);
  args.shape = check_bn_lif_x(x);
  args.eps = eps;
  args.x = x.const_data_ptr();
  const int64_t channels = x.size(2);
  Statistics found{empty_floats(x, channels), empty_floats(x, channels), empty_floats(x, channels)};
  const int64_t before = sums ? 0 : aligned(2 * channels * int64_t(sizeof(double)));
  const Tensor memory = empty_beside(x, before + bn_lif_moments_workspace_cuda(args.shape), at::kByte);
  const Tensor counters = zeroed_counters(x, bn_lif_counters_cuda(args.shape));
  uint8_t* const workspace = memory.mutable_data_ptr<uint8_t>();
  args.sums = sums ? sums : reinterpret_cast<double*>(workspace);
  args.mean = found.mean.mutable_data_ptr<float>();
  args.var = found.var.mutable_data_ptr<float>();
  args.rstd = found.rstd.mutable_data_ptr<float>();
  args.workspace = workspace + before;
  args.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int>());
  bn_lif_moments_cuda(args, current_stream());
  return found;
}

// -> sums [2, C], mean, var, rstd
std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_bn_lif_x(x);
  Tensor sums = empty_sums(x, 2, x.size(2));
  auto [mean, var, rstd] = statistics(x, eps, sums.mutable_data_ptr<double>());
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
  return bn_lif_forward_cuda(x, weight, bias, threshold, leak, eps, reset, v_reset, detach_reset, surrogate,
                             surrogate_scale, nullptr);
}

// What the first pass backward returns.
struct Gradients {
  Tensor grad_x, grad_weight, grad_bias, grad_threshold, grad_leak;
};

// Launches the first pass, whose sums, grad_mean, slope and workspace have their place.
Gradients sum_gradients(BnLifCuda& args, const Tensor& x, const Tensor& threshold, const Tensor& leak) {
  const int64_t channels = x.size(2);
  Gradients found{empty_spikes(x, args.shape.neurons), empty_floats(x, channels), empty_floats(x, channels),
                  empty_floats(x, threshold.numel()), empty_floats(x, leak.numel())};
  const Tensor counters = zeroed_counters(x, bn_lif_counters_cuda(args.shape));
  args.grad_x = found.grad_x.mutable_data_ptr();
  args.grad_weight = found.grad_weight.mutable_data_ptr<float>();
  args.grad_bias = found.grad_bias.mutable_data_ptr<float>();
  args.grad_threshold = found.grad_threshold.mutable_data_ptr<float>();
  args.grad_leak = found.grad_leak.mutable_data_ptr<float>();
  args.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int>());
  bn_lif_sums_cuda(args, current_stream());
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, std::string reset, double v_reset,
                                                            bool detach_reset, std::string surrogate,
                                                            double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
  const int64_t channels = x.size(2), floats = aligned(channels * int64_t(sizeof(float)));
  const int64_t doubles = aligned(kBnLifCudaSums * channels * int64_t(sizeof(double)));
  const Tensor memory = empty_beside(x, doubles + 2 * floats + bn_lif_workspace_cuda(args.shape), at::kByte);
  uint8_t* const start = memory.mutable_data_ptr<uint8_t>();
  args.sums = reinterpret_cast<double*>(start);
  args.grad_mean = reinterpret_cast<float*>(start + doubles);
  args.slope = reinterpret_cast<float*>(start + doubles + floats);
  args.workspace = start + doubles + 2 * floats;
  Gradients found = sum_gradients(args, x, threshold, leak);
  bn_lif_grad_x_cuda(args, current_stream());
  return {found.grad_x, found.grad_weight, found.grad_bias, found.grad_threshold, found.grad_leak};
}

// The same for many processes, which add up their sums between the two passes.
std::tuple<Tensor, Tensor, Tensor> gradient_sums(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& threshold,
                                                 const Tensor& leak, std::string reset, double v_reset,
                                                 bool detach_reset, std::string surrogate, double surrogate_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  BnLifCuda args = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
  const int64_t channels = x.size(2);
  Tensor sums = empty_sums(x, kBnLifCudaSums, channels);
  Tensor workspace = empty_beside(x, bn_lif_workspace_cuda(args.shape), at::kByte);
  const Tensor means = empty_floats(x, 2 * channels);  // of this process alone
  args.sums = sums.mutable_data_ptr<double>();
  args.grad_mean = means.mutable_data_ptr<float>();
  args.slope = args.grad_mean + channels;
  args.workspace = workspace.mutable_data_ptr();
  const Gradients found = sum_gradients(args, x, threshold, leak);
  return {found.grad_x, sums, workspace};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_forward_cuda(const Tensor& x, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, const Tensor& threshold,
                                                               const Tensor& leak, double eps, const std::string& reset,
                                                               double v_reset, bool detach_reset,
                                                               const std::string& surrogate, double surrogate_scale,
                                                               const Running* running) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [mean, var, rstd] = statistics(x, eps, nullptr, running);
  return {fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate, surrogate_scale),
          mean, var, rstd};
}

std::tuple<Tensor, Tensor> bn_lif_totals_cuda(const Tensor& totals, double eps, const Running& running) {
  const c10::cuda::CUDAGuard guard(totals.device());
  const int64_t channels = totals.size(1);
  std::tuple<Tensor, Tensor> found{empty_floats(totals, channels), empty_floats(totals, channels)};
  bn_lif_totals_cuda({channels, eps, totals.const_data_ptr<double>(), std::get<0>(found).mutable_data_ptr<float>(),
                      std::get<1>(found).mutable_data_ptr<float>(), pointers(running)},
                     current_stream());
  return found;
}

}  // namespace iirsnn

#endif
