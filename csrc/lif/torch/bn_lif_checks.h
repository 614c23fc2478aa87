// Checks that the bn_lif ops share.
#pragma once

#include <string>

#include "lif/torch/lif_checks.h"

namespace iirsnn {

inline const float* check_channels(const char* name, const Tensor& value, const Tensor& x) {
  TORCH_CHECK_TYPE(value.scalar_type() == at::kFloat, name, ": expected float32, got ", value.scalar_type());
  TORCH_CHECK_VALUE(
      value.device() == x.device() && value.sizes() == at::IntArrayRef({x.size(2)}) && value.is_contiguous(), name,
      ": expected contiguous [C] on ", x.device(), " for x ", x.sizes(), ", got ", value.sizes(), " on ",
      value.device());
  return value.const_data_ptr<float>();
}

// x [T, B, C, ...], whose channels are counted; float16 is for GPUs.
inline LifShape check_bn_lif_x(const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || (dtype == at::kHalf && !x.is_cpu()),
                   "x: expected float32 or bfloat16", x.is_cpu() ? "" : " or float16", ", got ", dtype);
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.numel() > 0, "x: expected shape [T, B, C, ...] without a 0, got ", x.sizes());
  LifShape shape = check_x(x);
  if (x.size(2) > 1) {
    shape.channels = x.size(2);
    shape.inner = x.stride(2);
  }
  return shape;
}

// All of a call of `Call`, that of a CPU or of a GPU, but threshold and leak.
template <typename Call>
Call check_bn_lif(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                  const OptionalTensor& bias, const std::string& reset, double v_reset, bool detach_reset,
                  const std::string& surrogate, double surrogate_scale) {
  Call call{};
  call.shape = check_bn_lif_x(x);
  call.reset = parse_reset(reset);
  call.v_reset = v_reset;
  take_surrogate(call, detach_reset, surrogate, surrogate_scale);
  call.x = x.const_data_ptr();
  call.mean = check_channels("mean", mean, x);
  call.rstd = check_channels("rstd", rstd, x);
  call.weight = weight ? check_channels("weight", *weight, x) : nullptr;
  call.bias = bias ? check_channels("bias", *bias, x) : nullptr;
  return call;
}

}  // namespace iirsnn
