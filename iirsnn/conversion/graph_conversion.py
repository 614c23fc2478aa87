"""Any network of convolutions, norms and ReLU as a spiking one, by way of its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..models.graph import GraphNetwork, mean_over_time, merge_time, split_time
from ..nn import BatchNormLIF, FusedLIF, SharedDropout, direct
from .batch_norm_folding import fold_graph, module_at
from .normal_form import normal_form
from .tracing import trace
from .units import give_units

#: Of the largest logit: what the graph of the ANN may differ from it, folded norms included.
_ROUNDING = 1e-3


def graph_to_spiking(
    ann: nn.Module,
    timesteps: int,
    build: Callable[[int], FusedLIF],
    image_shape: tuple[int, ...],
    *,
    keep_batch_norm: bool = False,
) -> GraphNetwork:
    """A copy of the ANN with neurons of threshold 1, in the form that `iirsnn.models.graph` tells.

    Args:
        ann: left unchanged.
        timesteps: T of the result.
        build: the neurons of a layer of so many channels.
        image_shape: of one image, [C, H, W].
        keep_batch_norm: norms stay, with the neurons behind them as BatchNormLIF.

    Raises:
        ValueError: a network that cannot be traced, or with functions that are not linear beside
            ReLU and its kin, or without any; or whose graph does not give what it gives.
    """
    device, dtype = _placed(ann)
    with _evaluating(ann), torch.no_grad():
        graph_module = normal_form(trace(ann, image_shape, dtype), type(ann).__name__)
        graph_module.graph.eliminate_dead_code()
        graph_module.delete_all_unused_submodules()
        if not keep_batch_norm:
            fold_graph(graph_module)
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
        _check_same(ann, graph_module.to(device).eval(), images.to(device, dtype))
    ceilings = _exchange(graph_module, build, device)
    if not ceilings:
        raise ValueError("ann: no ReLU to exchange for a neuron")
    give_units(graph_module, image_shape)
    lay_in_time(graph_module)
    shape = tuple(image_shape)
    snn = GraphNetwork(graph_module, timesteps, shape, ceilings=ceilings)
    return snn.train(ann.training)


def _placed(ann: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in ann.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


@contextmanager
def _evaluating(ann: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in ann.modules()}
    ann.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_same(ann: nn.Module, graph_module: fx.GraphModule, images: torch.Tensor) -> None:
    expected, got = ann(images.clone()), graph_module(images)
    largest = float(expected.abs().max())
    difference = float((expected - got).abs().max())
    if not math.isfinite(largest):
        raise ValueError("ann: gives NaN or inf on random images")
    if difference > _ROUNDING * largest:
        raise ValueError(
            f"ann: expected a network that its graph repeats, got logits that differ by "
            f"{difference:.3g} of {largest:.3g}: does it change values in place or keep a state?"
        )


def _exchange(
    graph_module: fx.GraphModule, build: Callable[[int], FusedLIF], device: torch.device
) -> dict[str, float]:
    """Neurons for all activations, in place; where each one saturates, by its module's name."""
    ceilings: dict[str, float] = {}
    for node in list(graph_module.graph.nodes):
        activation: Any = module_at(graph_module, node)
        if not isinstance(activation, (nn.ReLU, nn.Hardtanh)):
            continue
        name = str(node.target)
        neuron = build(node.meta["value"].shape[1]).to(device)
        before = node.args[0]
        norm: Any = module_at(graph_module, before)
        if _can_hold(norm) and len(before.users) == 1:
            graph_module.set_submodule(before.target, BatchNormLIF(norm, neuron))
            node.replace_all_uses_with(before)
            graph_module.graph.erase_node(node)
            graph_module.delete_submodule(name)
            name = f"{before.target}.neuron"
        else:
            graph_module.set_submodule(name, neuron)
        ceilings[name] = float(getattr(activation, "max_val", math.inf))
    graph_module.recompile()
    return ceilings


def _can_hold(norm: nn.Module | None) -> bool:
    return type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def lay_in_time(graph_module: fx.GraphModule) -> None:
    """Time, in place: values before any neuron stand once, those behind one T times."""
    graph = graph_module.graph
    images = next(iter(graph.nodes))
    with graph.inserting_after(images):
        timesteps = graph.placeholder("timesteps")
    timed: set[fx.Node] = set()
    for node in list(graph.nodes):
        module = module_at(graph_module, node)
        if isinstance(module, SharedDropout) and node.args[0] not in timed:
            graph_module.set_submodule(node.target, nn.Dropout(module.p))
        elif isinstance(module, (FusedLIF, BatchNormLIF, SharedDropout)):
            source = node.args[0]
            with graph.inserting_before(node):
                way = split_time if source in timed else direct
                node.args = (graph.call_function(way, (source, timesteps)),)
            with graph.inserting_after(node):
                merged = graph.call_function(merge_time, (node,))
            node.replace_all_uses_with(merged, lambda user, merged=merged: user is not merged)
            timed.add(merged)
        elif node.op == "output":
            if node.args[0] not in timed:
                raise ValueError("ann: expected neurons between images and logits, got none")
            with graph.inserting_before(node):
                mean = graph.call_function(mean_over_time, (node.args[0], timesteps))
            node.args = (mean,)
        elif any(source in timed for source in node.all_input_nodes):
            timed.add(node)
            for source in node.all_input_nodes:
                if source not in timed:
                    with graph.inserting_before(node):
                        repeated = graph.call_function(direct, (source, timesteps))
                        merged = graph.call_function(merge_time, (repeated,))
                    node.replace_input_with(source, merged)
    graph.lint()
    graph_module.recompile()
