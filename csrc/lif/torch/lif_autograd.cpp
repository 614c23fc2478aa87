// Schemas of the LIF ops and the gradient of lif_forward; iirsnn/ops/lif.py says what they mean, and is their twin
// where this file is not compiled.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "lif/torch/lif_ops.h"

namespace iirsnn {
namespace {

using at::IValue;
using torch::autograd::InputMetadata;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
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
void refuse_tangents(const Tensors&... tensors) {
  const bool any = (torch::autograd::isFwGradDefined(tensors) || ...);
  TORCH_CHECK_NOT_IMPLEMENTED(!any,
                              "iirsnn: expected a backward pass through lif, got forward mode (a jvp); a surrogate "
                              "gradient is a rule for backward");
}
template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && torch::autograd::compute_requires_grad(tensors...);
}

Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }
OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

// The gradient of lif_forward as torch's own ops have theirs: a node of the graph whose members are what it keeps.
// autograd::Function would keep them by name in a map, and what it knows of inputs and outputs beside them.
struct LifGradient : Node {
  enum Input { kX, kThreshold, kLeak, kV0, kInputs };
  SavedVariable kept[kInputs];
  Options options;
  bool return_v = false;

  std::string name() const override { return "LifGradient"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool parameters = task_should_compute_output(kThreshold) || task_should_compute_output(kLeak);
    Tensor inputs[kInputs];
    for (int i = 0; i < kInputs; ++i) inputs[i] = kept[i].unpack();
    return gradients(grads, inputs, options, return_v, parameters);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : kept) variable.reset_data();
  }

  // Of a graph that is compiled as a whole (torch._dynamo.compiled_autograd).
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& variable : kept) args.collect(variable, false);
    args.collect(options.reset);
    args.collect(options.v_reset);
    args.collect(options.detach_reset);
    args.collect(options.surrogate);
    args.collect(options.surrogate_scale);
    args.collect(return_v);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    for (SavedVariable& variable : kept) saved.before(variable);
    variable_list inputs;
    for (SavedVariable& variable : kept) inputs.push_back(variable.unpack());
    const bool parameters = task_should_compute_output(kThreshold) || task_should_compute_output(kLeak);
    const std::vector<IValue> arguments = packed(inputs, parameters);
    std::vector<at::TypePtr> schema;
    for (const IValue& argument : arguments) schema.push_back(argument.type());
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function = compiler->bind_function(saved.get_py_compiler(), name(), &unpacked, schema, true);
    const auto metadata = torch::dynamo::autograd::IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
        torch::dynamo::autograd::get_input_metadata(next_edges()));
    variable_list result =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads, arguments, metadata);
    for (SavedVariable& variable : kept) saved.after(variable);
    return result;
  }

 private:
  static variable_list gradients(const variable_list& grads, const Tensor* inputs, const Options& options,
                                 bool return_v, bool parameters) {
    const Tensor &x = inputs[kX], &v0 = inputs[kV0];
    const Tensor grad_s = grads[0].defined() ? grads[0] : at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    const OptionalTensor grad_v = return_v ? or_none(grads[1]) : OptionalTensor();
    auto [grad_x, grad_threshold, grad_leak, grad_v0] = lif_backward_op().call(
        grad_s, grad_v, x, inputs[kThreshold], inputs[kLeak], or_none(v0), options.reset, options.v_reset,
        options.detach_reset, options.surrogate, options.surrogate_scale, parameters);
    if (!parameters) grad_threshold = grad_leak = Tensor();
    if (!v0.defined()) grad_v0 = Tensor();
    return {std::move(grad_x), std::move(grad_threshold), std::move(grad_leak), std::move(grad_v0)};
  }

  std::vector<IValue> packed(const variable_list& inputs, bool parameters) const {
    return {inputs,   options.reset, options.v_reset, options.detach_reset, options.surrogate, options.surrogate_scale,
            return_v, parameters};
  }
  static variable_list unpacked(const variable_list& grads, const std::vector<IValue>& packed) {
    const std::vector<Tensor> inputs = packed[0].toTensorVector();
    const Options options{packed[1].toStringRef(), packed[2].toDouble(), packed[3].toBool(), packed[4].toStringRef(),
                          packed[5].toDouble()};
    return gradients(grads, inputs.data(), options, packed[6].toBool(), packed[7].toBool());
  }
};

// Nodes are counted by intrusive_ptr, in older versions of torch by shared_ptr.
using NodePointer = std::decay_t<decltype(std::declval<const Tensor&>().grad_fn())>;
template <typename Pointer>
Pointer owned(Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(node, [](auto* old) { deleteNode(old); });
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

// What the gradients of a gradient's inputs would come from.
struct NoSecondGradient : Node {
  std::string name() const override { return "NoSecondLifGradient"; }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK(false,
                "iirsnn: expected one backward pass through lif, got a second one through its gradient "
                "(create_graph=True); a surrogate gradient has no second derivative worth having");
  }
};

std::tuple<Tensor, Tensor> forward_with_gradient(c10::DispatchKeySet keys, const Tensor& x, const Tensor& threshold,
                                                 const Tensor& leak, const OptionalTensor& v0, std::string reset,
                                                 double v_reset, bool detach_reset, std::string surrogate,
                                                 double surrogate_scale, bool return_v) {
  const c10::DispatchKeySet below = keys & c10::after_ADInplaceOrView_keyset;
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return lif_forward_op().redispatch(below, x, threshold, leak, v0, std::move(reset), v_reset, detach_reset,
                                       std::move(surrogate), surrogate_scale, return_v);
  };
  refuse_tangents(x, threshold, leak, or_undefined(v0));
  if (!needs_gradient(x, threshold, leak, or_undefined(v0))) return run();
  auto* const gradient = new LifGradient;
  const NodePointer node = owned<NodePointer>(gradient);
  node->set_next_edges(torch::autograd::collect_next_edges(x, threshold, leak, or_undefined(v0)));
  const Tensor inputs[] = {x, threshold, leak, or_undefined(v0)};
  for (int i = 0; i < LifGradient::kInputs; ++i) gradient->kept[i] = SavedVariable(inputs[i], false);
  gradient->options = {reset, v_reset, detach_reset, surrogate, surrogate_scale};
  gradient->return_v = return_v;
  auto [s, v] = run();
  torch::autograd::set_history(s, node);
  if (return_v) torch::autograd::set_history(v, node);
  return {std::move(s), std::move(v)};
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
  if (needs_gradient(grad_s, grad_v_or_not, x, threshold, leak, v0_or_not)) {
    const NodePointer node = owned<NodePointer>(new NoSecondGradient);
    node->set_next_edges(torch::autograd::collect_next_edges(grad_s, grad_v_or_not, x, threshold, leak, v0_or_not));
    std::apply([&](auto&... all) { (torch::autograd::set_history(all, node), ...); }, gradients);
  }
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
