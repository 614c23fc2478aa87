// The ops of BatchNorm and LIF in one as the dispatcher knows them, those that a plain training step calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>

namespace iirsnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using BnLifForwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& x, const OptionalTensor& weight,
                                                                         const OptionalTensor& bias,
                                                                         const Tensor& threshold, const Tensor& leak,
                                                                         double eps, std::string reset, double v_reset,
                                                                         bool detach_reset, std::string surrogate,
                                                                         double surrogate_scale);
using BnLifBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak, std::string reset, double v_reset,
    bool detach_reset, std::string surrogate, double surrogate_scale);

const c10::TypedOperatorHandle<BnLifForwardSignature>& bn_lif_forward_op();
const c10::TypedOperatorHandle<BnLifBackwardSignature>& bn_lif_backward_op();

}  // namespace iirsnn
