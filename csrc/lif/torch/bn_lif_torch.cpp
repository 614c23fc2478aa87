// Checks, allocation and threads of the bn_lif ops, whose schemas are defined in iirsnn/ops/batch_norm.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/lif_cpu.h"
#include "lif/lif_checks.h"

namespace iirsnn {
namespace {

struct BnLifCall {
  BnLif args{};
  Tensor threshold, leak;  // [C]
};

const float* check_channels(const char* name, const Tensor& value, const Tensor& x) {
  TORCH_CHECK_TYPE(value.scalar_type() == at::kFloat, name, ": expected float32, got ", value.scalar_type());
  TORCH_CHECK_VALUE(value.is_cpu() && value.sizes() == at::IntArrayRef({x.size(2)}) && value.is_contiguous(), name,
                    ": expected contiguous [C] on the CPU for x ", x.sizes(), ", got ", value.sizes(), " on ",
                    value.device());
  return value.const_data_ptr<float>();
}

BnLifCall check_call(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& threshold,
                     const Tensor& leak, const std::string& reset, double v_reset, bool detach_reset,
                     const std::string& surrogate, double surrogate_scale) {
  BnLifCall call;
  BnLif& args = call.args;
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                   "x: expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.numel() > 0, "x: expected shape [T, B, C, ...] without a 0, got ", x.sizes());
  args.shape = check_x(x);
  std::tie(call.threshold, call.leak) = check_parameters(threshold, leak, x, args.shape);
  if (x.size(2) > 1) {
    args.shape.channels = x.size(2);
    args.shape.inner = x.stride(2);
    call.threshold = call.threshold.expand({x.size(2)}).contiguous();
    call.leak = call.leak.expand({x.size(2)}).contiguous();
  }
  args.reset = parse_reset(reset);
  args.v_reset = v_reset;
  args.detach_reset = detach_reset;
  args.surrogate = parse_surrogate(surrogate);
  args.surrogate_scale = surrogate_scale;
  args.x = x.const_data_ptr();
  args.weight = weight ? check_channels("weight", *weight, x) : nullptr;
  args.bias = bias ? check_channels("bias", *bias, x) : nullptr;
  args.threshold = call.threshold.const_data_ptr<float>();
  args.leak = call.leak.const_data_ptr<float>();
  return call;
}

template <typename F>
void for_all_chunks(const LifShape& shape, F f) {
  at::parallel_for(0, lif_chunks_cpu(shape), 1, f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_forward(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, const Tensor& threshold,
                                                          const Tensor& leak, double eps, std::string reset,
                                                          double v_reset, bool detach_reset, std::string surrogate,
                                                          double surrogate_scale) {
  BnLifCall call =
      check_call(x, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate, surrogate_scale);
  BnLif& args = call.args;
  const LifShape& shape = args.shape;
  const int64_t channels = shape.channels;
  std::vector<double> sums(lif_chunks_cpu(shape) * kMoments * channels);
  for_all_chunks(shape, [&](int64_t first, int64_t last) { moments_cpu(shape, args.x, sums.data(), first, last); });
  add_chunks_cpu(shape, kMoments, sums.data());

  const auto options = x.options().dtype(at::kFloat);
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  Tensor rstd = at::empty({channels}, options), s = empty_spikes(x, shape.neurons);
  const double count = double(shape.timesteps) * double(shape.neurons / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double centre = sums[c] / count, spread = sums[channels + c] / count - centre * centre;
    const double variance = spread < 0 ? 0 : spread;  // below 0 by rounding; NaN stays
    mean.mutable_data_ptr<float>()[c] = float(centre);
    var.mutable_data_ptr<float>()[c] = float(variance);
    rstd.mutable_data_ptr<float>()[c] = float(1 / std::sqrt(variance + eps));
  }
  args.mean = mean.const_data_ptr<float>();
  args.rstd = rstd.const_data_ptr<float>();
  args.s = s.mutable_data_ptr();
  for_all_chunks(shape, [&](int64_t first, int64_t last) { bn_lif_forward_cpu(args, first, last); });
  return {s, mean, var, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_lif_backward(
    const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, std::string reset, double v_reset,
    bool detach_reset, std::string surrogate, double surrogate_scale) {
  BnLifCall call =
      check_call(x, weight, bias, threshold, leak, reset, v_reset, detach_reset, surrogate, surrogate_scale);
  BnLif& args = call.args;
  const LifShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const Tensor grad_s_like = check_grad_s(grad_s, x, shape.neurons);
  args.mean = check_channels("mean", mean, x);
  args.rstd = check_channels("rstd", rstd, x);
  args.grad_s = grad_s_like.const_data_ptr();
  args.grad_s_stride_t = x.size(0) > 1 && grad_s_like.stride(0) == 0 ? 0 : shape.neurons;
  Tensor grad_x = empty_spikes(x, shape.neurons);
  args.grad_x = grad_x.mutable_data_ptr();
  std::vector<double> sums(lif_chunks_cpu(shape) * kBnLifSums * channels);
  args.sums = sums.data();
  for_all_chunks(shape, [&](int64_t first, int64_t last) { bn_lif_backward_cpu(args, first, last); });
  add_chunks_cpu(shape, kBnLifSums, args.sums);
  for_all_chunks(shape, [&](int64_t first, int64_t last) { bn_lif_grad_x_cpu(args, first, last); });

  // a scalar acts on every channel
  const auto gradient = [&](LifSum which, int64_t size) {
    Tensor grad = at::empty({size}, threshold.options());
    float* to = grad.mutable_data_ptr<float>();
    const double* from = args.sums + which * channels;
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) {
      total += from[c];
      to[size == 1 ? 0 : c] = float(size == 1 ? total : from[c]);
    }
    return grad;
  };
  for (int64_t c = 0; c < channels; ++c) args.sums[kDotSum * channels + c] *= args.rstd[c];
  return {grad_x, gradient(kDotSum, channels), gradient(kGradSum, channels), gradient(kThresholdSum, threshold.numel()),
          gradient(kLeakSum, leak.numel())};
}

TORCH_LIBRARY_IMPL(iirsnn, CPU, m) {
  m.impl("bn_lif_forward", &bn_lif_forward);
  m.impl("bn_lif_backward", &bn_lif_backward);
}

}  // namespace
}  // namespace iirsnn
