// Schemas of the LIF ops and the gradient of lif_forward; iirsnn/ops/lif.py says what they mean, and is their twin
// where this file is not compiled.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "lif/torch/lif_ops.h"

namespace iirsnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the gradient of an op needs to know of its call, beside the tensors.
struct Options {
  std::string reset;
  double v_reset;
  bool detach_reset;
  std::string surrogate;
  double surrogate_scale;
};

template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  if (at::GradMode::is_enabled() && torch::autograd::compute_requires_grad(tensors...)) return true;
  return (torch::autograd::isFwGradDefined(tensors) || ...);  // whose formula raises
}

Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }

class LifGradient : public torch::autograd::Function<LifGradient> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& threshold, const Tensor& leak,
                               const OptionalTensor& v0, const Options& options, bool return_v) {
    auto [s, v] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below;
      return lif_forward_op().call(x, threshold, leak, v0, options.reset, options.v_reset, options.detach_reset,
                                   options.surrogate, options.surrogate_scale, return_v);
    }();
    context->set_materialize_grads(false);
    context->save_for_backward({x, threshold, leak, or_undefined(v0)});
    auto& saved = context->saved_data;
    saved["reset"] = options.reset;
    saved["v_reset"] = options.v_reset;
    saved["detach_reset"] = options.detach_reset;
    saved["surrogate"] = options.surrogate;
    saved["surrogate_scale"] = options.surrogate_scale;
    saved["return_v"] = return_v;
    return {s, v};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list kept = context->get_saved_variables();
    const Tensor &x = kept[0], &threshold = kept[1], &leak = kept[2];
    auto& saved = context->saved_data;
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); };
    const Tensor grad_s = grads[0].defined() ? grads[0] : at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    // AOTAutograd makes a gradient of 0 elements for the empty v
    const OptionalTensor grad_v = saved["return_v"].toBool() ? optional(grads[1]) : OptionalTensor();
    const bool parameters = context->needs_input_grad(1) || context->needs_input_grad(2);
    auto [grad_x, grad_threshold, grad_leak, grad_v0] =
        lif_backward_op().call(grad_s, grad_v, x, threshold, leak, optional(kept[3]), saved["reset"].toStringRef(),
                               saved["v_reset"].toDouble(), saved["detach_reset"].toBool(),
                               saved["surrogate"].toStringRef(), saved["surrogate_scale"].toDouble(), parameters);
    if (!parameters) grad_threshold = grad_leak = Tensor();
    if (!kept[3].defined()) grad_v0 = Tensor();
    return {grad_x, grad_threshold, grad_leak, grad_v0, Tensor(), Tensor()};
  }
};

class NoSecondGradient : public torch::autograd::Function<NoSecondGradient> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& grad_s, const OptionalTensor& grad_v, const Tensor& x,
                               const Tensor& threshold, const Tensor& leak, const OptionalTensor& v0,
                               const Options& options, bool parameters) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_x, grad_threshold, grad_leak, grad_v0] =
        lif_backward_op().call(grad_s, grad_v, x, threshold, leak, v0, options.reset, options.v_reset,
                               options.detach_reset, options.surrogate, options.surrogate_scale, parameters);
    return {grad_x, grad_threshold, grad_leak, grad_v0};
  }

  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false,
                "iirsnn: expected one backward pass through lif, got a second one through its gradient "
                "(create_graph=True); a surrogate gradient has no second derivative worth having");
  }
};

std::tuple<Tensor, Tensor> forward_with_gradient(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                                 const OptionalTensor& v0, std::string reset, double v_reset,
                                                 bool detach_reset, std::string surrogate, double surrogate_scale,
                                                 bool return_v) {
  if (!needs_gradient(x, threshold, leak, or_undefined(v0))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return lif_forward_op().call(x, threshold, leak, v0, reset, v_reset, detach_reset, surrogate, surrogate_scale,
                                 return_v);
  }
  const Options options{reset, v_reset, detach_reset, surrogate, surrogate_scale};
  const variable_list outputs = LifGradient::apply(x, threshold, leak, v0, options, return_v);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_without_second(const Tensor& grad_s, const OptionalTensor& grad_v,
                                                                   const Tensor& x, const Tensor& threshold,
                                                                   const Tensor& leak, const OptionalTensor& v0,
                                                                   std::string reset, double v_reset, bool detach_reset,
                                                                   std::string surrogate, double surrogate_scale,
                                                                   bool parameters) {
  if (!needs_gradient(grad_s, or_undefined(grad_v), x, threshold, leak, or_undefined(v0))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return lif_backward_op().call(grad_s, grad_v, x, threshold, leak, v0, reset, v_reset, detach_reset, surrogate,
                                  surrogate_scale, parameters);
  }
  const Options options{reset, v_reset, detach_reset, surrogate, surrogate_scale};
  const variable_list outputs = NoSecondGradient::apply(grad_s, grad_v, x, threshold, leak, v0, options, parameters);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

// Where the kernels are compiled at first use, the Python twin has defined the ops already.
bool defined_here = false;

TORCH_LIBRARY_FRAGMENT(iirsnn, m) {
  defined_here = !c10::Dispatcher::singleton().findSchema({"iirsnn::lif_forward", ""}).has_value();
  if (!defined_here) return;
  // the layout of x decides the layout of everything that comes out: Inductor must not change it
  const std::vector<at::Tag> tags{at::Tag::needs_exact_strides};
  m.def(
      "lif_forward(Tensor x, Tensor threshold, Tensor leak, Tensor? v0, str reset, float v_reset, bool detach_reset, "
      "str surrogate, float surrogate_scale, bool return_v) -> (Tensor s, Tensor v)",
      tags);
  m.def(
      "lif_backward(Tensor grad_s, Tensor? grad_v, Tensor x, Tensor threshold, Tensor leak, Tensor? v0, str reset, "
      "float v_reset, bool detach_reset, str surrogate, float surrogate_scale, bool need_parameter_grads) -> "
      "(Tensor grad_x, Tensor grad_threshold, Tensor grad_leak, Tensor grad_v0)",
      tags);
  m.def(
      "lif_packed(Tensor x, Tensor threshold, Tensor leak, Tensor? v0, str reset, float v_reset, bool return_v) -> "
      "(Tensor bits, Tensor v)",
      tags);
  m.def("unpack_spikes(Tensor bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(iirsnn, Autograd, m) {
  if (!defined_here) return;
  m.impl("lif_forward", &forward_with_gradient);
  m.impl("lif_backward", &backward_without_second);
}

}  // namespace

const ForwardOp& lif_forward_op() {
  static const ForwardOp op =
      c10::Dispatcher::singleton().findSchemaOrThrow("iirsnn::lif_forward", "").typed<ForwardSignature>();
  return op;
}

const BackwardOp& lif_backward_op() {
  static const BackwardOp op =
      c10::Dispatcher::singleton().findSchemaOrThrow("iirsnn::lif_backward", "").typed<BackwardSignature>();
  return op;
}

}  // namespace iirsnn
