// Schemas of the bn_lif ops and the gradient of bn_lif_forward; iirsnn/ops/batch_norm.py says what they mean, and is
// their twin where this file is not compiled.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lif/torch/bn_lif_ops.h"
#include "lif/torch/gradient.h"
#include "lif/torch/triton_call.h"

namespace iirsnn {
namespace {

// Of bn_lif_forward, whose statistics have none of their own.
struct BnLifGradient : Gradient<BnLifGradient, 7> {
  enum Kept { kX, kWeight, kBias, kThreshold, kLeak, kMean, kRstd };
  static constexpr int kInputs = kMean;
  static constexpr const char* kName = "BnLifGradient";

  static variable_list gradients(const variable_list& grads, const Tensor* kept, const Options& options,
                                 int64_t wanted) {
    const Tensor& x = kept[kX];
    const Tensor grad_s = grads[0].defined() ? grads[0] : at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    auto [grad_x, grad_weight, grad_bias, grad_threshold, grad_leak] =
        options.triton
            ? bn_lif_backward_by_triton(grad_s, x, kept[kMean], kept[kRstd], kept[kWeight], kept[kBias],
                                        kept[kThreshold], kept[kLeak], options, wanted & (1 << kThreshold | 1 << kLeak))
            : bn_lif_backward_op().call(grad_s, x, kept[kMean], kept[kRstd], or_none(kept[kWeight]),
                                        or_none(kept[kBias]), kept[kThreshold], kept[kLeak], options.reset,
                                        options.v_reset, options.detach_reset, options.surrogate,
                                        options.surrogate_scale);
    variable_list all{std::move(grad_x), std::move(grad_weight), std::move(grad_bias), std::move(grad_threshold),
                      std::move(grad_leak)};
    for (int i = 0; i < kInputs; ++i) {
      if (!(wanted >> i & 1)) all[i] = Tensor();
    }
    return all;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_differentiable(c10::DispatchKeySet keys, const Tensor& x,
                                                                 const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, const Tensor& threshold,
                                                                 const Tensor& leak, double eps, std::string reset,
                                                                 double v_reset, bool detach_reset,
                                                                 std::string surrogate, double surrogate_scale) {
  const Options options{reset, v_reset, detach_reset, surrogate, surrogate_scale};
  return bn_lif_with_gradient(x, weight, bias, threshold, leak, options, [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return bn_lif_forward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, weight, bias, threshold, leak,
                                          eps, std::move(reset), v_reset, detach_reset, std::move(surrogate),
                                          surrogate_scale);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_lif_without_second(
    c10::DispatchKeySet keys, const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& threshold, const Tensor& leak,
    std::string reset, double v_reset, bool detach_reset, std::string surrogate, double surrogate_scale) {
  const Tensor weight_or_not = or_undefined(weight), bias_or_not = or_undefined(bias);
  refuse_tangents(grad_s, x, mean, rstd, weight_or_not, bias_or_not, threshold, leak);
  auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return bn_lif_backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_s, x, mean, rstd, weight,
                                           bias, threshold, leak, std::move(reset), v_reset, detach_reset,
                                           std::move(surrogate), surrogate_scale);
  }();
  refuse_second(gradients, grad_s, x, mean, rstd, weight_or_not, bias_or_not, threshold, leak);
  return gradients;
}

// Where the kernels are compiled at first use, the Python twin has defined the ops already.
bool bn_lif_defined_here = false;

TORCH_LIBRARY_FRAGMENT(iirsnn, m) {
  bn_lif_defined_here = !c10::Dispatcher::singleton().findSchema({"iirsnn::bn_lif_forward", ""}).has_value();
  if (!bn_lif_defined_here) return;
  // the layout of x decides the layout of everything that comes out: Inductor must not change it
  const std::vector<at::Tag> tags{at::Tag::needs_exact_strides};
  const std::string parameters = "Tensor? weight, Tensor? bias, Tensor threshold, Tensor leak, ";
  const std::string options = "str reset, float v_reset, bool detach_reset, str surrogate, float surrogate_scale) -> ";
  const std::string call = "Tensor x, Tensor mean, Tensor rstd, " + parameters + options;
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  define("bn_lif_forward(Tensor x, " + parameters + "float eps, " + options +
         "(Tensor s, Tensor mean, Tensor var, Tensor rstd)");
  define("bn_lif_backward(Tensor grad_s, " + call +
         "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_threshold, Tensor grad_leak)");
  define("bn_lif_moments(Tensor x, float eps) -> (Tensor sums, Tensor mean, Tensor var, Tensor rstd)");
  define("bn_lif_fire(" + call + "Tensor");
  define("bn_lif_gradient_sums(Tensor grad_s, " + call + "(Tensor grad_x, Tensor sums, Tensor workspace)");
  define("bn_lif_grad_x(Tensor(a!) grad_x, Tensor workspace, Tensor grad_mean, Tensor slope, Tensor grad_s, " + call +
         "()");
}

TORCH_LIBRARY_IMPL(iirsnn, Autograd, m) {
  if (!bn_lif_defined_here) return;
  m.impl("bn_lif_forward", &bn_lif_differentiable);
  m.impl("bn_lif_backward", &bn_lif_without_second);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_with_gradient(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& threshold,
    const Tensor& leak, const Options& options, c10::function_ref<std::tuple<Tensor, Tensor, Tensor, Tensor>()> run) {
  const Tensor inputs[] = {x, or_undefined(weight), or_undefined(bias), threshold, leak};
  refuse_tangents(x, inputs[1], inputs[2], threshold, leak);
  const bool differentiable = needs_gradient(x, inputs[1], inputs[2], threshold, leak);
  auto found = run();
  if (!differentiable) return found;
  auto& [s, mean, var, rstd] = found;
  auto* const gradient = new BnLifGradient;
  const NodePointer node = owned<NodePointer>(gradient);
  node->set_next_edges(edges_of(x, inputs[1], inputs[2], threshold, leak));
  for (int i = 0; i < BnLifGradient::kInputs; ++i) gradient->kept[i] = SavedVariable(inputs[i], false);
  gradient->kept[BnLifGradient::kMean] = SavedVariable(mean, false);
  gradient->kept[BnLifGradient::kRstd] = SavedVariable(rstd, false);
  gradient->options = options;
  torch::autograd::set_history(s, node);
  return found;
}

const c10::TypedOperatorHandle<BnLifForwardSignature>& bn_lif_forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("iirsnn::bn_lif_forward", "").typed<BnLifForwardSignature>();
  return op;
}

const c10::TypedOperatorHandle<BnLifBackwardSignature>& bn_lif_backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("iirsnn::bn_lif_backward", "").typed<BnLifBackwardSignature>();
  return op;
}

}  // namespace iirsnn
