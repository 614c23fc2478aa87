"""Any network of this package as one graph without time, for exporters: what stands at T = 1."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..models import MembraneBlock, Network, ResidualBlock
from ..models.graph import TIME_FUNCTIONS, GraphNetwork, GraphTracer
from ..nn import Readout, SharedDropout
from .batch_norm_folding import fold_batch_norm
from .graph_conversion import lay_in_time
from .node_kinds import DROPOUTS


@dataclass(frozen=True)
class Step:
    """A node of a network, time and dropout left out.

    Attributes:
        name: unlike any other's; dots as in the network.
        kind: module, or function or method by name: add, cat, getitem, pad, reshape, permute.
        module: what a module node calls.
        inputs: names of the steps whose values it takes; "images" for the network's input.
        arguments: the others, by position.
        shape, input_shape: of its value and of its first input, for one image.
    """

    name: str
    kind: str
    module: Any
    inputs: tuple[str, ...]
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]


def as_graph(network: nn.Module) -> GraphNetwork:
    """A Network as a GraphNetwork with the same logits at T = 1, norms folded; others as they are.

    At T > 1 its logits are the mean over time, those of a Network the sum.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(network, GraphNetwork):
        return network
    if not isinstance(network, Network):
        kind = type(network).__name__
        raise TypeError(f"snn: expected a Network or a GraphNetwork, got {kind}")
    network = copy.deepcopy(network)
    fold_batch_norm(network)
    builder = GraphBuilder()
    last = builder.chain(network.layers, builder.images, "layers")
    return builder.network(last, network.timesteps, network.image_shape).train(network.training)


class GraphBuilder:
    """Writes a graph of modules and adds, and lays time into it.

    Attributes:
        images: the node of the input.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph(tracer_cls=GraphTracer)
        self.images = self.graph.placeholder("images")
        self._modules: dict[str, nn.Module] = {}

    def call(self, module: nn.Module, x: fx.Node, name: str) -> fx.Node:
        self._modules[name] = module
        return self.graph.call_module(name, (x,))

    def add(self, x: fx.Node, other: fx.Node) -> fx.Node:
        return self.graph.call_function(operator.add, (x, other))

    def chain(self, module: nn.Module, x: fx.Node, name: str) -> fx.Node:
        """A module, or the modules of a Sequential or residual block, one after the other."""
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                x = self.chain(child, x, f"{name}.{key}")
            return x
        if isinstance(module, ResidualBlock):
            shortcut = self.chain(module.shortcut, x, f"{name}.shortcut")
            main = self.chain(module.main, x, f"{name}.main")
            return self.call(module.neuron, self.add(main, shortcut), f"{name}.neuron")
        if isinstance(module, MembraneBlock):
            spikes = self.call(module.neuron, x, f"{name}.neuron")
            main = self.chain(module.main, spikes, f"{name}.main")
            alone = len(module.shortcut) == 0
            return self.add(
                main, x if alone else self.chain(module.shortcut, spikes, f"{name}.shortcut")
            )
        if isinstance(module, Readout):
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            return self.call(linear, x, name)
        return self.call(module, x, name)

    def network(
        self, last: fx.Node, timesteps: int, image_shape: tuple[int, ...] | None
    ) -> GraphNetwork:
        self.graph.output(last)
        graph_module = fx.GraphModule(self._modules, self.graph)
        lay_in_time(graph_module)
        return GraphNetwork(graph_module, timesteps, image_shape)


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps the shape of each value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.shapes[node] = tuple(result.shape[1:])
        return result


@torch.no_grad()
def steps(network: GraphNetwork, image_shape: tuple[int, ...] | None) -> Iterator[Step]:
    """The nodes of a network in order; the last one gives the logits.

    Raises:
        ValueError: no image shape, neither given nor known.
    """
    shape = image_shape or network.image_shape
    if shape is None:
        raise ValueError("image_shape: expected [C, H, W] of an image, got None")
    like = next(network.parameters())
    training = network.training
    found = _Shapes(network.eval().graph_module)
    found.run(torch.zeros(1, *shape, dtype=like.dtype, device=like.device), 1)
    network.train(training)
    names: dict[fx.Node, str] = {}
    nodes: Any = network.graph_module.graph.nodes
    for node in nodes:
        sources = [n for n in node.all_input_nodes if n in names]
        module: Any = None
        if node.op == "placeholder":
            names[node] = "images"
            continue
        if node.op == "call_module":
            module = network.graph_module.get_submodule(str(node.target))
        through = isinstance(module, (SharedDropout, nn.Identity, *DROPOUTS))
        if node.op == "output" or through or node.target in TIME_FUNCTIONS:
            names[node] = names[sources[0]]
            continue
        names[node] = str(node.target) if module is not None else node.name
        kind = "module" if module is not None else getattr(node.target, "__name__", node.target)
        plain = tuple(a for a in node.args if a not in sources and not _of_nodes(a))
        shape_of = found.shapes[node], _without_time(found, sources[0], module)
        yield Step(
            *(names[node], str(kind), module, tuple(names[n] for n in _inputs(node))),
            *(plain, _one_image(shape_of[0], module), shape_of[1]),
        )


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values a node takes, in order and each as often as it is taken."""
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        return [each for each in first if isinstance(each, fx.Node)]
    return [each for each in node.args if isinstance(each, fx.Node)]


def _of_nodes(argument: Any) -> bool:
    return isinstance(argument, (list, tuple)) and any(isinstance(a, fx.Node) for a in argument)


def _one_image(shape: tuple[int, ...], module: Any) -> tuple[int, ...]:
    """Without the batch that follows the time axis of what neurons give."""
    return shape[1:] if getattr(module, "over_time", False) else shape


def _without_time(found: _Shapes, source: fx.Node, module: Any) -> tuple[int, ...]:
    return _one_image(found.shapes[source], module)
