"""Layers -> the engine in C++ (csrc/event/) that runs them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, UsageError
from ..ops import build
from .layer import Input, Layer, Window

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


def build_engine(
    layers: list[Layer], image_shape: tuple[int, int, int], timesteps: int
) -> tuple[Any, list[int]]:
    """The engine, and the multiply-accumulates of a dense network's same layers for an image.

    Raises:
        UsageError: layers that do not fit each other, or images of this shape.
        RunError: there is no compiled extension.
    """
    engine = _extension().EventEngine(*image_shape, timesteps)
    dense = []
    for layer in layers:
        shape = engine.shape(layer.inputs[0].source)
        try:
            gives = _add(engine, layer)
        except ValueError as error:
            raise UsageError(
                f"{layer.name}: cannot follow {' x '.join(map(str, shape))} ({error})"
            ) from error
        positions = math.prod(engine.shape(gives)[1:]) if gives else 1
        dense.append(positions * sum(weight.numel() for weight in layer.weights))
    return engine, dense


def _add(engine: Any, layer: Layer) -> int:
    """Adds a layer; returns the number of what it gives, 0 for the last one."""
    first = layer.inputs[0]
    if layer.kind in ("max_pool", "average_pool"):
        assert layer.window is not None
        add = engine.add_max_pool if layer.kind == "max_pool" else engine.add_average_pool
        return add(first.source, layer.window.numbers())
    if layer.kind == "adaptive_pool":
        assert layer.size is not None
        return engine.add_adaptive_pool(first.source, *layer.size)
    if layer.kind == "channels":
        parts = [(each.source, each.first, each.channels, each.unit) for each in layer.inputs]
        return engine.add_channels(parts)
    if layer.kind == "sum":
        return engine.add_sum([(each.source, each.times) for each in layer.inputs])
    if layer.kind == "output":
        engine.add_output(first.source, first.unit)
        return 0
    synapses = [_synapses(engine, each) for each in layer.inputs if each.weight is not None]
    skips = [(each.source, each.unit) for each in layer.inputs if each.weight is None]
    precision = _PRECISIONS[layer.weights[0].dtype] if layer.weights else "fp32"
    sums = (precision, _vector(layer.bias), _vector(layer.scale))
    if layer.kind == "readout":
        engine.add_readout(*synapses, *sums)
        return 0
    if layer.kind == "currents":
        return engine.add_currents(synapses, skips, *sums)
    neurons = (_vector(layer.threshold), _vector(layer.leak), layer.reset, layer.v_reset)
    return engine.add_neurons(synapses, skips, *sums, *neurons)


def _synapses(engine: Any, given: Input) -> tuple[int, Any, int, list[int]]:
    """The source, its weight [outputs, channels / groups, *kernel], groups and window."""
    weight, window = given.weight, given.window
    assert weight is not None
    if window is None:
        shape = engine.shape(given.source)
        if weight.shape[1] != math.prod(shape):
            raise UsageError(f"expected {math.prod(shape)} input features, got {weight.shape[1]}")
        weight, window = weight.unflatten(1, shape), Window((shape[1], shape[2]))
    return given.source, weight.float().numpy(), given.groups, window.numbers()


def _vector(tensor: Tensor | None) -> Any:
    return (torch.zeros(0) if tensor is None else tensor).numpy()


def _extension() -> Any:
    reason = build.load()
    if reason is not None:
        raise RunError(f"the event engine needs the compiled extension: {reason}")
    return importlib.import_module("iirsnn._C")
