"""What a spike stands for: the weights that it meets next carry the threshold of its neuron.

A neuron of threshold V that fires at a rate of r stands for the activation r V of the ANN. Its
spikes are 1, so the next layer's weights are V times the ANN's, column by column. Which column
meets which neuron is found by sending, instead of activations, a number for each neuron through
the graph: pools, concats, slices, shuffles and reshapes move it just as they move the spikes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..models.graph import TIME_FUNCTIONS, Affine
from ..nn import BatchNormLIF, FusedLIF, SharedDropout
from .node_kinds import DROPOUTS, LAYERS, MOVING, SPATIAL
from .tracing import on_meta

#: A spike's number is neuron * _CHANNELS + channel, from neuron 1; 0 is a value of the ANN's unit.
_CHANNELS = 1 << 20


@dataclass(frozen=True)
class Consumer:
    """A layer that spikes meet: conv, linear or Affine, and what each input channel carries.

    Attributes:
        layer: holds the weights.
        numbers: int64 [input channels].
    """

    layer: nn.Module
    numbers: Tensor

    @torch.no_grad()
    def scale(self, neuron: int, factor: Tensor) -> None:
        """Multiply the weights that neuron layer meets, counted from 1; factor: [1] or [C]."""
        mine = self.numbers // _CHANNELS == neuron
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        mine = mine.to(weight.device)
        if not mine.any():
            return
        by_channel = torch.ones(len(mine), dtype=weight.dtype, device=weight.device)
        channel = (self.numbers % _CHANNELS).to(weight.device)[mine]
        factor = factor.to(weight)
        by_channel[mine] = factor[channel] if len(factor) > 1 else factor
        weight.mul_(_over_inputs(self.layer, by_channel))


def _over_inputs(layer: nn.Module, by_channel: Tensor) -> Tensor:
    """Values of the input channels in a shape that multiplies the layer's weight."""
    if isinstance(layer, Affine):
        return by_channel
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.Linear):
        return by_channel
    ones = [1] * (weight.dim() - 2)
    if getattr(layer, "transposed", False):
        return by_channel.view(-1, 1, *ones)
    groups: int = layer.groups  # type: ignore[assignment]
    rows = by_channel.view(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    return rows.reshape(len(weight), -1, *ones)


def consumers(graph_module: fx.GraphModule, image_shape: tuple[int, ...]) -> list[Consumer]:
    """The layers that the spikes of a graph meet; every other value has the ANN's unit."""
    walk = _Walk(graph_module)
    walk.run(torch.zeros(1, *image_shape, dtype=torch.float64), 1)
    return walk.consumers


def give_units(graph_module: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
    """Put an Affine of weight 1, without bias, where spikes meet no weights; before time is in.

    Raises:
        ValueError: spikes of several neurons in one channel of a layer.
    """
    at_source: set[int] = set()
    while True:
        walk = _Walk(graph_module)
        walk.run(torch.zeros(1, *image_shape, dtype=torch.float64), 1)
        if not walk.mixed:
            break
        if walk.mixed <= at_source:
            raise ValueError("ann: spikes of several neurons in one channel")
        at_source |= walk.mixed
        for number in sorted(walk.mixed):
            node = walk.sources[number]
            _insert(graph_module, node, list(node.users), walk.channels[node])
    for node, source in dict.fromkeys(walk.unitless):
        _insert(graph_module, source, [node], walk.channels[source])
    graph_module.graph.lint()
    graph_module.recompile()


def _insert(
    graph_module: fx.GraphModule, source: fx.Node, users: list[fx.Node], channels: int
) -> None:
    """An Affine between a value and some of its users."""
    like = next(iter(graph_module.parameters()))
    unit = Affine(torch.ones(channels, dtype=like.dtype, device=like.device))
    unit.requires_grad_(False)
    stem = "unit" if source.op != "call_module" else f"{str(source.target).replace('.', '_')}_unit"
    name, number = stem, 0
    while hasattr(graph_module, name):
        number += 1
        name = f"{stem}_{number}"
    graph_module.add_submodule(name, unit)
    with graph_module.graph.inserting_after(source):
        node = graph_module.graph.call_module(name, (source,))
    node.meta["value"] = source.meta["value"]
    for user in users:
        user.replace_input_with(source, node)


class _Walk(fx.Interpreter):
    """Runs a graph on numbers of neurons, [1, C, ...] float64.

    Attributes:
        consumers: found so far.
        unitless: (node, input) where spikes meet neither weights nor what leaves them their unit.
        mixed: neurons that share a channel of a layer with others.
        sources: the node of each neuron layer.
        channels: of each node that carries spikes.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.consumers: list[Consumer] = []
        self.unitless: list[tuple[fx.Node, fx.Node]] = []
        self.mixed: set[int] = set()
        self.sources: dict[int, fx.Node] = {}
        self.channels: dict[fx.Node, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        self.node = node
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.dim() > 1:
            self.channels[node] = result.shape[1]
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        module, (x,) = self.module.get_submodule(target), args
        if isinstance(module, (FusedLIF, BatchNormLIF, *_ACTIVATIONS)):
            self._needs_unit(self.node.args[0], x)
            return self._fire(x)
        if isinstance(module, (*DROPOUTS, SharedDropout)):
            return x
        if isinstance(module, MOVING):
            return module(x)
        if isinstance(module, SPATIAL):
            return self._spread(x, on_meta(module, torch.empty(x.shape, device="meta")))
        if isinstance(module, (*LAYERS, Affine)):
            self._meets(module, x)
        else:  # a norm that is kept
            self._needs_unit(self.node.args[0], x)
        shape = torch.empty(x.shape, dtype=_dtype(module), device="meta")
        return torch.zeros(on_meta(module, shape).shape, dtype=torch.float64)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in TIME_FUNCTIONS:
            return args[0]
        whole_channels = target is torch.cat and args[1] == 1
        if target is operator.add or (target is torch.cat and not whole_channels):
            parts = args[0] if target is torch.cat else args
            inputs = self.node.args[0] if target is torch.cat else self.node.args
            for node, x in zip(inputs, parts, strict=True):  # type: ignore[arg-type]
                self._needs_unit(node, x)
            result = super().call_function(target, args, kwargs)
            return torch.zeros_like(result)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._needs_unit(self.node.args[0], args[0])
        return args[0]

    def _fire(self, x: Tensor) -> Tensor:
        number = len(self.sources) + 1
        self.sources[number] = self.node
        channel = torch.arange(x.shape[1], dtype=torch.float64) + number * _CHANNELS
        return channel.view(-1, *[1] * (x.dim() - 2)).expand(x.shape).clone()

    def _spread(self, x: Tensor, like: Tensor) -> Tensor:
        """Each channel's number over the map that a pool gives."""
        if x.dim() < 3:
            return x
        maps = x.flatten(2)
        self._one_neuron(maps[0])
        number = maps.amax(2)
        return number.view(*number.shape, *[1] * (like.dim() - 2)).expand(like.shape).clone()

    def _needs_unit(self, node: Any, x: Tensor) -> None:
        if x.any():
            self.unitless.append((self.node, node))

    def _meets(self, module: nn.Module, x: Tensor) -> None:
        if not x.any():
            return
        axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1
        by_channel = x.movedim(axis, 0).flatten(1)
        self._one_neuron(by_channel)
        self.consumers.append(Consumer(module, by_channel.amax(1).long()))

    def _one_neuron(self, by_channel: Tensor) -> None:
        """Note the neurons of channels [C, values] that carry more than one neuron's spikes."""
        mixed = (by_channel != by_channel[:, :1]).any(1)
        self.mixed |= {int(n) // _CHANNELS for n in by_channel[mixed].unique() if n}


_ACTIVATIONS = (nn.ReLU, nn.Hardtanh)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)
