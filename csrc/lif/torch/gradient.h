// What the gradients of the ops have in common: nodes of autograd's graph whose members are what they keep.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace iirsnn {

using at::IValue;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::InputMetadata;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What the gradient of a neuron's op needs to know of its call, beside the tensors.
struct Options {
  std::string reset;
  double v_reset;
  bool detach_reset;
  std::string surrogate;
  double surrogate_scale;
  bool return_v = false;
  bool triton = false;  // whose kernels are called

  template <typename Options, typename Visit>
  static void each(Options& options, const Visit& visit) {
    visit(options.reset);
    visit(options.v_reset);
    visit(options.detach_reset);
    visit(options.surrogate);
    visit(options.surrogate_scale);
    visit(options.return_v);
    visit(options.triton);
  }
};

inline Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }
inline OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

// Whether a mode, a transform or a tracer is to see what is done, or one of the tensors is no plain one. That is for
// the ops; all else need not pay for the dispatcher.
constexpr c10::DispatchKeySet kUnwatching =
    c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
constexpr c10::DispatchKeySet kNotPlain({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::Batched, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor});
template <typename... Tensors>
bool for_the_ops(const Tensors&... tensors) {
  return !(c10::impl::tls_local_dispatch_key_set().included_ - kUnwatching).empty() ||
         ((tensors.defined() && (tensors.key_set().has_any(kNotPlain) || tensors.layout() != at::kStrided)) || ...);
}

// As isFwGradDefined, which takes a lock; but a view may have its base's.
inline bool has_tangent(const Tensor& t) {
  if (!t.defined()) return false;
  const auto* meta = static_cast<torch::autograd::AutogradMeta*>(t.unsafeGetTensorImpl()->autograd_meta());
  return meta != nullptr && (meta->fw_grad_ || meta->is_view_) && torch::autograd::isFwGradDefined(t);
}

template <typename... Tensors>
void refuse_tangents(const Tensors&... tensors) {
  const bool any = (has_tangent(tensors) || ...);
  TORCH_CHECK_NOT_IMPLEMENTED(!any,
                              "iirsnn: expected a backward pass through lif, got forward mode (a jvp); a surrogate "
                              "gradient is a rule for backward");
}
template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && torch::autograd::compute_requires_grad(tensors...);
}

// The gradient of an op as torch's own ops have theirs. autograd::Function would keep tensors by name in a map, and
// what it knows of inputs and outputs beside them. Own has kName and
//   variable_list gradients(const variable_list& grads, const Tensor* kept, const Known&, int64_t wanted)
// where bit i of `wanted` is whether the gradient of input i is. Known::each visits its members: strings, numbers and
// vectors of int64_t.
template <typename Own, int kKept, typename Known = Options>
struct Gradient : Node {
  std::array<SavedVariable, kKept> kept;
  Known options;

  std::string name() const override { return Own::kName; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<Tensor, kKept> tensors;
    for (int i = 0; i < kKept; ++i) tensors[i] = kept[i].unpack();
    return Own::gradients(grads, tensors.data(), options, wanted());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : kept) variable.reset_data();
  }

  // Of a graph that is compiled as a whole (torch._dynamo.compiled_autograd).
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& variable : kept) args.collect(variable, false);
    Known::each(options, [&](const auto& member) { args.collect(member); });
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    for (SavedVariable& variable : kept) saved.before(variable);
    variable_list tensors;
    for (SavedVariable& variable : kept) tensors.push_back(variable.unpack());
    const std::vector<IValue> arguments = packed(tensors);
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
  int64_t wanted() const {
    int64_t bits = 0;
    for (size_t i = 0; i < num_outputs(); ++i) bits |= int64_t(task_should_compute_output(i)) << i;
    return bits;
  }

  std::vector<IValue> packed(const variable_list& tensors) const {
    std::vector<IValue> all{tensors, wanted()};
    Known::each(options, [&](const auto& member) { all.emplace_back(member); });
    return all;
  }
  static variable_list unpacked(const variable_list& grads, const std::vector<IValue>& packed) {
    const std::vector<Tensor> tensors = packed[0].toTensorVector();
    Known options;
    auto next = packed.begin() + 2;
    Known::each(options, [&](auto& member) { member = (next++)->template to<std::decay_t<decltype(member)>>(); });
    return Own::gradients(grads, tensors.data(), options, packed[1].toInt());
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

// As collect_next_edges, whose list grows one by one.
template <typename... Tensors>
torch::autograd::edge_list edges_of(const Tensors&... tensors) {
  torch::autograd::edge_list edges;
  edges.reserve(sizeof...(tensors));
  (edges.push_back(tensors.defined() ? torch::autograd::impl::gradient_edge(tensors) : torch::autograd::Edge()), ...);
  return edges;
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

// Gives what an op of a gradient returned (a tuple) nodes that refuse, where one of its inputs needs a gradient.
template <typename Gradients, typename... Tensors>
void refuse_second(Gradients& gradients, const Tensors&... inputs) {
  if (!needs_gradient(inputs...)) return;
  const NodePointer node = owned<NodePointer>(new NoSecondGradient);
  node->set_next_edges(edges_of(inputs...));
  std::apply([&](auto&... all) { (torch::autograd::set_history(all, node), ...); }, gradients);
}

}  // namespace iirsnn
