// Schemas of the LIF ops and the gradient of lif_forward; iirsnn/ops/lif.py says what they mean, and is their twin
// where this file is not compiled.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lif/torch/gradient.h"
#include "lif/torch/lif_ops.h"
#include "lif/torch/triton_call.h"

namespace iirsnn {
namespace {

bool has_kernels(const Tensor& x) {
#if defined(IIRSNN_WITH_CUDA)
  if (x.is_cuda()) return true;
#endif
  return x.is_cpu();
}

// What the op returns, which is not asked where nobody watches.
std::tuple<Tensor, Tensor, Tensor, Tensor> lif_backward_by_kernels(const Tensor& grad_s, const Tensor& grad_v,
                                                                   const Tensor& x, const Tensor& threshold,
                                                                   const Tensor& leak, const Tensor& v0,
                                                                   const Options& options, bool parameters) {
  const auto arguments = [&](const auto& backward) {
    return backward(grad_s, or_none(grad_v), x, threshold, leak, or_none(v0), options.reset, options.v_reset,
                    options.detach_reset, options.surrogate, options.surrogate_scale, parameters);
  };
  if (!has_kernels(x) || for_the_ops(grad_s, grad_v, x, threshold, leak, v0))
    return arguments([](auto&&... all) { return lif_backward_op().call(all...); });
  refuse_tangents(grad_s, grad_v, x, threshold, leak, v0);
  auto gradients = [&] {
    RECORD_FUNCTION("iirsnn::lif_backward", (std::vector<IValue>{grad_s, grad_v, x, threshold, leak, v0}));
    const at::AutoDispatchBelowADInplaceOrView below;
    return arguments(lif_backward);
  }();
  refuse_second(gradients, grad_s, grad_v, x, threshold, leak, v0);
  return gradients;
}

// Of lif_forward.
struct LifGradient : Gradient<LifGradient, 4> {
  enum Input { kX, kThreshold, kLeak, kV0 };
  static constexpr const char* kName = "LifGradient";

  static variable_list gradients(const variable_list& grads, const Tensor* inputs, const Options& options,
                                 int64_t wanted) {
    const Tensor &x = inputs[kX], &v0 = inputs[kV0];
    const bool parameters = wanted & (1 << kThreshold | 1 << kLeak);
    Tensor zeros;
    if (!grads[0].defined()) zeros = at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    const Tensor& grad_s = grads[0].defined() ? grads[0] : zeros;
    const Tensor grad_v = options.return_v ? grads[1] : Tensor();
    auto [grad_x, grad_threshold, grad_leak, grad_v0] =
        options.triton
            ? lif_backward_by_triton(grad_s, grad_v, x, inputs[kThreshold], inputs[kLeak], v0, options, parameters)
            : lif_backward_by_kernels(grad_s, grad_v, x, inputs[kThreshold], inputs[kLeak], v0, options, parameters);
    if (!parameters) grad_threshold = grad_leak = Tensor();
    if (!v0.defined()) grad_v0 = Tensor();
    variable_list all(4);  // of a list in braces each would be copied
    all[kX] = std::move(grad_x);
    all[kThreshold] = std::move(grad_threshold);
    all[kLeak] = std::move(grad_leak);
    all[kV0] = std::move(grad_v0);
    return all;
  }
};

std::tuple<Tensor, Tensor> forward_with_gradient(c10::DispatchKeySet keys, const Tensor& x, const Tensor& threshold,
                                                 const Tensor& leak, const OptionalTensor& v0, std::string reset,
                                                 double v_reset, bool detach_reset, std::string surrogate,
                                                 double surrogate_scale, bool return_v) {
  const Options options{reset, v_reset, detach_reset, surrogate, surrogate_scale, return_v};
  return lif_with_gradient(x, threshold, leak, v0, options, [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return lif_forward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, threshold, leak, v0,
                                       std::move(reset), v_reset, detach_reset, std::move(surrogate), surrogate_scale,
                                       return_v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_without_second(
    c10::DispatchKeySet keys, const Tensor& grad_s, const OptionalTensor& grad_v, const Tensor& x,
    const Tensor& threshold, const Tensor& leak, const OptionalTensor& v0, std::string reset, double v_reset,
    bool detach_reset, std::string surrogate, double surrogate_scale, bool parameters) {
  const Tensor grad_v_or_not = or_undefined(grad_v), v0_or_not = or_undefined(v0);
  refuse_tangents(grad_s, grad_v_or_not, x, threshold, leak, v0_or_not);
  auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return lif_backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_s, grad_v, x, threshold, leak,
                                        v0, std::move(reset), v_reset, detach_reset, std::move(surrogate),
                                        surrogate_scale, parameters);
  }();
  refuse_second(gradients, grad_s, grad_v_or_not, x, threshold, leak, v0_or_not);
  return gradients;
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

std::tuple<Tensor, Tensor> lif_with_gradient(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                             const OptionalTensor& v0, const Options& options,
                                             c10::function_ref<std::tuple<Tensor, Tensor>()> run) {
  refuse_tangents(x, threshold, leak, or_undefined(v0));
  if (!needs_gradient(x, threshold, leak, or_undefined(v0))) return run();
  auto* const gradient = new LifGradient;
  const NodePointer node = owned<NodePointer>(gradient);
  node->set_next_edges(edges_of(x, threshold, leak, or_undefined(v0)));
  const Tensor* const inputs[] = {&x, &threshold, &leak, v0 ? &*v0 : nullptr};
  for (int i = 0; i < 4; ++i)
    if (inputs[i] != nullptr) gradient->kept[i] = SavedVariable(*inputs[i], false);
  gradient->options = options;
  auto [s, v] = run();
  torch::autograd::set_history(s, node);
  if (options.return_v) torch::autograd::set_history(v, node);
  return {std::move(s), std::move(v)};
}

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
