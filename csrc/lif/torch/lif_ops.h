// The LIF ops as the dispatcher knows them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>

namespace iirsnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                                    const OptionalTensor& v0, std::string reset, double v_reset,
                                                    bool detach_reset, std::string surrogate, double surrogate_scale,
                                                    bool return_v);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& grad_s, const OptionalTensor& grad_v,
                                                                     const Tensor& x, const Tensor& threshold,
                                                                     const Tensor& leak, const OptionalTensor& v0,
                                                                     std::string reset, double v_reset,
                                                                     bool detach_reset, std::string surrogate,
                                                                     double surrogate_scale, bool need_parameter_grads);
using ForwardOp = c10::TypedOperatorHandle<ForwardSignature>;
using BackwardOp = c10::TypedOperatorHandle<BackwardSignature>;

const ForwardOp& lif_forward_op();
const BackwardOp& lif_backward_op();

// What they do on CPU and CUDA tensors, in lif_torch.cpp; undefined where the op gives a tensor of no elements.
ForwardSignature lif_forward;
BackwardSignature lif_backward;

}  // namespace iirsnn
