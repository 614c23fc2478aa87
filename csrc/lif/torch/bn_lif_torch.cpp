// Checks, allocation and threads of the bn_lif ops, whose schemas are defined in bn_lif_autograd.cpp.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/lif_cpu.h"
#include "lif/torch/bn_lif_checks.h"
#include "lif/torch/chunks.h"

namespace iirsnn {
namespace {

struct BnLifCall {
  BnLif args{};
  Tensor threshold, leak;  // [C]
};

BnLifCall check_call(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, const std::string& reset,
                     double v_reset, bool detach_reset, const std::string& surrogate, double surrogate_scale) {
  BnLifCall call;
  BnLif& args = call.args;
  args = check_bn_lif<BnLif>(x, mean, rstd, weight, bias, reset, v_reset, detach_reset, surrogate, surrogate_scale);
  std::tie(call.threshold, call.leak) = check_parameters(threshold, leak, x, args.shape);
  args.threshold = call.threshold.const_data_ptr<float>();
  args.leak = call.leak.const_data_ptr<float>();
  return call;
}

Tensor empty_chunks(const Tensor& x, const LifShape& shape, int64_t sums) {
  return empty_beside(x, {lif_chunks_cpu(shape), sums, shape.channels}, {sums * shape.channels, shape.channels, 1},
                      at::kDouble);
}

struct Statistics {
  Tensor chunks, mean, var, rstd;  // sums [2, C] of x and its square in the first of the chunks
};

Statistics statistics(const Tensor& x, double eps) {
  const LifShape shape = check_bn_lif_x(x);
  const int64_t channels = shape.channels;
  Statistics found{empty_chunks(x, shape, kMoments), empty_beside(x, channels, at::kFloat),
                   empty_beside(x, channels, at::kFloat), empty_beside(x, channels, at::kFloat)};
  double* sums = found.chunks.mutable_data_ptr<double>();
  for_chunks(shape, [&](int64_t first, int64_t last) { moments_cpu(shape, x.const_data_ptr(), sums, first, last); });
  moments_finish_cpu(shape, sums);

  float *mean = found.mean.mutable_data_ptr<float>(), *var = found.var.mutable_data_ptr<float>();
  float* rstd = found.rstd.mutable_data_ptr<float>();
  const double count = double(shape.timesteps) * double(shape.neurons / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double centre = sums[c] / count, spread = sums[channels + c] / count - centre * centre;
    const double variance = spread < 0 ? 0 : spread;  // below 0 by rounding; NaN stays
    mean[c] = float(centre);
    var[c] = float(variance);
    rstd[c] = float(1 / std::sqrt(variance + eps));
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, double eps) {
  const auto [chunks, mean, var, rstd] = statistics(x, eps);
  return {chunks[0], mean, var, rstd};
}

Tensor fire(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
            const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, std::string reset, double v_reset,
            bool detach_reset, std::string surrogate, double surrogate_scale) {
  BnLifCall call = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  BnLif& args = call.args;
  Tensor s = empty_spikes(x, args.shape.neurons);
  args.s = s.mutable_data_ptr();
  for_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_forward_cpu(args, first, last); });
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& threshold,
                                                   const Tensor& leak, double eps, std::string reset, double v_reset,
                                                   bool detach_reset, std::string surrogate, double surrogate_scale) {
  const auto [chunks, mean, var, rstd] = statistics(x, eps);
  return {fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate, surrogate_scale),
          mean, var, rstd};
}

// Allocates and fills grad_x, not finished, and sums [kBnLifSums, C] in the first of the chunks.
std::pair<Tensor, Tensor> sum_gradients(BnLif& args, const Tensor& x) {
  Tensor grad_x = empty_spikes(x, args.shape.neurons);
  args.grad_x = grad_x.mutable_data_ptr();
  Tensor chunks = empty_chunks(x, args.shape, kBnLifSums);
  args.sums = chunks.mutable_data_ptr<double>();
  for_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_backward_cpu(args, first, last); });
  bn_lif_backward_finish_cpu(args);
  args.sums = nullptr;  // the second pass is to add nothing to them
  return {grad_x, chunks};
}

// -> grad_x, not finished, and sums [kBnLifSums, C]; the workspace is of other devices
std::tuple<Tensor, Tensor, Tensor> gradient_sums(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& threshold,
                                                 const Tensor& leak, std::string reset, double v_reset,
                                                 bool detach_reset, std::string surrogate, double surrogate_scale) {
  BnLifCall call = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  const Tensor grad_s_like = take_grad_s(call.args, grad_s, x);
  const auto [grad_x, chunks] = sum_gradients(call.args, x);
  return {grad_x, chunks[0], empty_beside(x, 0, at::kByte)};
}

// Finishes grad_x.
void finish_grad_x(const Tensor& grad_x, const Tensor&, const Tensor& grad_mean, const Tensor& slope,
                   const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& threshold,
                   const Tensor& leak, std::string reset, double v_reset, bool detach_reset, std::string surrogate,
                   double surrogate_scale) {
  BnLifCall call = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  BnLif& args = call.args;
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
  args.grad_mean = check_channels("grad_mean", grad_mean, x);
  args.slope = check_channels("slope", slope, x);
  args.grad_x = grad_x.mutable_data_ptr();
  for_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_grad_x_cpu(args, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, std::string reset, double v_reset,
                                                            bool detach_reset, std::string surrogate,
                                                            double surrogate_scale) {
  BnLifCall call = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  BnLif& args = call.args;
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
  const auto [grad_x, chunks] = sum_gradients(args, x);
  const int64_t channels = x.size(2);
  const double count = double(x.numel() / channels);
  const double* total = chunks.const_data_ptr<double>();
  Tensor grad_weight = empty_beside(x, channels, at::kFloat);
  const Tensor means = empty_beside(x, 2 * channels, at::kFloat);
  float *grad_mean = means.mutable_data_ptr<float>(), *slope = grad_mean + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double dot = total[kDotSum * channels + c], scale = args.rstd[c];
    grad_weight.mutable_data_ptr<float>()[c] = float(dot * scale);
    grad_mean[c] = float(total[kGradSum * channels + c] / count);
    slope[c] = float(dot / count * scale * scale);
  }
  args.grad_mean = grad_mean;
  args.slope = slope;
  for_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_grad_x_cpu(args, first, last); });

  // a scalar acts on every channel
  const auto gradient = [&](LifSum which, int64_t size) {
    Tensor grad = empty_beside(x, size, at::kFloat);
    float* to = grad.mutable_data_ptr<float>();
    const double* from = total + which * channels;
    double all = 0;
    for (int64_t c = 0; c < channels; ++c) {
      all += from[c];
      to[size == 1 ? 0 : c] = float(size == 1 ? all : from[c]);
    }
    return grad;
  };
  return {grad_x, grad_weight, gradient(kGradSum, channels), gradient(kThresholdSum, threshold.numel()),
          gradient(kLeakSum, leak.numel())};
}

TORCH_LIBRARY_IMPL(iirsnn, CPU, m) {
  m.impl("bn_lif_forward", &forward);
  m.impl("bn_lif_backward", &backward);
  m.impl("bn_lif_moments", &moments);
  m.impl("bn_lif_fire", &fire);
  m.impl("bn_lif_gradient_sums", &gradient_sums);
  m.impl("bn_lif_grad_x", &finish_grad_x);
}

}  // namespace
}  // namespace iirsnn
