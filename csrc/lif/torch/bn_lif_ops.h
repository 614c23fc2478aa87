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

// What a BatchNorm keeps: float [C], float [C] and an int64. momentum: NaN where they are means over all calls.
struct Running {
  Tensor mean, var, calls;
  double momentum;
};

#if defined(IIRSNN_WITH_CUDA)
// As the op on CUDA tensors; the call is counted in `running`, if any, without a launch more.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_forward_cuda(const Tensor& x, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, const Tensor& threshold,
                                                               const Tensor& leak, double eps, const std::string& reset,
                                                               double v_reset, bool detach_reset,
                                                               const std::string& surrogate, double surrogate_scale,
                                                               const Running* running);
// totals: double [3, C] as BnLifTotals has them -> mean, rstd; the call is counted in `running`, in the same launch.
std::tuple<Tensor, Tensor> bn_lif_totals_cuda(const Tensor& totals, double eps, const Running& running);
#endif

const c10::TypedOperatorHandle<BnLifForwardSignature>& bn_lif_forward_op();
const c10::TypedOperatorHandle<BnLifBackwardSignature>& bn_lif_backward_op();

}  // namespace iirsnn
