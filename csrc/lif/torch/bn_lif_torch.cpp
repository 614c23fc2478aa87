// Checks, allocation and threads of the bn_lif ops, whose schemas are defined in iirsnn/ops/batch_norm.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/lif_cpu.h"
#include "lif/torch/bn_lif_checks.h"

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

template <typename F>
void for_all_chunks(const LifShape& shape, F f) {
  at::parallel_for(0, lif_chunks_cpu(shape), 1, f);
}

// -> sums [2, C] of x and its square, mean, var, rstd
std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, double eps) {
  const LifShape shape = check_bn_lif_x(x);
  const int64_t channels = shape.channels;
  Tensor chunks = empty_chunks(x, shape, kMoments);
  double* sums = chunks.mutable_data_ptr<double>();
  for_all_chunks(shape,
                 [&](int64_t first, int64_t last) { moments_cpu(shape, x.const_data_ptr(), sums, first, last); });
  add_chunks_cpu(shape, kMoments, sums);

  Tensor mean = empty_beside(x, channels, at::kFloat), var = empty_beside(x, channels, at::kFloat);
  Tensor rstd = empty_beside(x, channels, at::kFloat);
  const double count = double(shape.timesteps) * double(shape.neurons / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double centre = sums[c] / count, spread = sums[channels + c] / count - centre * centre;
    const double variance = spread < 0 ? 0 : spread;  // below 0 by rounding; NaN stays
    mean.mutable_data_ptr<float>()[c] = float(centre);
    var.mutable_data_ptr<float>()[c] = float(variance);
    rstd.mutable_data_ptr<float>()[c] = float(1 / std::sqrt(variance + eps));
  }
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
  for_all_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_forward_cpu(args, first, last); });
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

// -> grad_x, not finished, and sums [kBnLifSums, C]; the workspace is of other devices
std::tuple<Tensor, Tensor, Tensor> gradient_sums(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& threshold,
                                                 const Tensor& leak, std::string reset, double v_reset,
                                                 bool detach_reset, std::string surrogate, double surrogate_scale) {
  BnLifCall call = check_call(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate,
                              surrogate_scale);
  BnLif& args = call.args;
  const LifShape& shape = args.shape;
  const Tensor grad_s_like = take_grad_s(args, grad_s, x);
  Tensor grad_x = empty_spikes(x, shape.neurons);
  args.grad_x = grad_x.mutable_data_ptr();
  Tensor chunks = empty_chunks(x, shape, kBnLifSums);
  args.sums = chunks.mutable_data_ptr<double>();
  std::fill_n(args.sums, chunks.numel(), 0.0);
  for_all_chunks(shape, [&](int64_t first, int64_t last) { bn_lif_backward_cpu(args, first, last); });
  add_chunks_cpu(shape, kBnLifSums, args.sums);
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
  const Tensor grad_s_like = check_grad_s(grad_s, x, args.shape.neurons);
  args.grad_s = grad_s_like.const_data_ptr();
  args.grad_s_stride_t = x.size(0) > 1 && grad_s_like.stride(0) == 0 ? 0 : args.shape.neurons;
  args.grad_mean = check_channels("grad_mean", grad_mean, x);
  args.slope = check_channels("slope", slope, x);
  args.grad_x = grad_x.mutable_data_ptr();
  for_all_chunks(args.shape, [&](int64_t first, int64_t last) { bn_lif_grad_x_cpu(args, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_s, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, std::string reset, double v_reset,
                                                            bool detach_reset, std::string surrogate,
                                                            double surrogate_scale) {
  const Tensor grad_s_like =
      check_grad_s(grad_s, x, check_bn_lif_x(x).neurons);  // copied once for both passes, if at all
  const auto [grad_x, sums, workspace] = gradient_sums(grad_s_like, x, mean, rstd, weight, bias, threshold, leak, reset,
                                                       v_reset, detach_reset, surrogate, surrogate_scale);
  const int64_t channels = x.size(2);
  const double count = double(x.numel() / channels);
  const float* rstd_of = rstd.const_data_ptr<float>();
  const double* total = sums.const_data_ptr<double>();
  Tensor grad_weight = empty_beside(x, channels, at::kFloat), grad_mean = empty_beside(x, channels, at::kFloat);
  Tensor slope = empty_beside(x, channels, at::kFloat);
  for (int64_t c = 0; c < channels; ++c) {
    const double dot = total[kDotSum * channels + c], scale = rstd_of[c];
    grad_weight.mutable_data_ptr<float>()[c] = float(dot * scale);
    grad_mean.mutable_data_ptr<float>()[c] = float(total[kGradSum * channels + c] / count);
    slope.mutable_data_ptr<float>()[c] = float(dot / count * scale * scale);
  }
  finish_grad_x(grad_x, workspace, grad_mean, slope, grad_s_like, x, mean, rstd, weight, bias, threshold, leak, reset,
                v_reset, detach_reset, surrogate, surrogate_scale);

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
