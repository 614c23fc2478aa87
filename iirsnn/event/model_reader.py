"""A trained model as the engine's layers: module by module, BatchNorm folded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..conversion import folded
from ..errors import UsageError
from ..models import Network, ResidualBlock
from ..nn import FusedLIF, Readout, SharedDropout
from .layer import Layer, Window, check_finite

_IGNORED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, SharedDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute, in order, with their names."""
    if isinstance(module, Network):
        yield from _leaves(module.layers, "layers")
    elif isinstance(module, nn.Sequential):
        for key, child in module.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name or "model", module


def _unsupported(name: str, module: nn.Module, why: str) -> UsageError:
    return UsageError(f"{name} ({type(module).__name__}): {why}")


def layers_of(model: nn.Module) -> list[Layer]:
    """The engine's layers of a model in eval mode, float32.

    Raises:
        UsageError: a module the engine does not have, by its name; weights that are not finite.
    """
    reader = _Reader()
    last = reader.read(_leaves(model))
    if last is None or isinstance(last[1], nn.Conv2d):
        raise UsageError("model: expected a Linear as its last layer, without neurons")
    return [*reader.layers, replace(_synapses(*last, reader.divisor), kind="readout")]


class _Reader:
    """Collects the engine's layers module by module.

    Attributes:
        layers: so far.
        flat: a Flatten was there.
        divisor: what the average pools since the last neurons left to be divided by.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.flat = False
        self.divisor = 1

    def read(self, modules: Iterable[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
        """Adds the layers of the modules; a last Conv2d or Linear without neurons is returned."""
        pending: tuple[str, nn.Module] | None = None  # a Conv2d or Linear; its neurons come next
        for name, module in modules:
            kind = type(module)
            if kind in _IGNORED:
                continue
            if pending is not None and kind not in (*_BATCH_NORMS, FusedLIF):
                after = f"{name} ({kind.__name__})"
                raise _unsupported(
                    *pending, f"expected a BatchNorm or FusedLIF after it, got {after}"
                )
            if kind is nn.Flatten:
                if module.start_dim != 1 or module.end_dim not in (-1, 3):
                    raise _unsupported(name, module, "expected start_dim=1 and end_dim=-1")
                self.flat = True
            elif kind in (nn.Conv2d, nn.Linear, Readout):
                if self.flat == (kind is nn.Conv2d):
                    wanted = "no" if self.flat else "a"
                    raise _unsupported(name, module, f"expected {wanted} Flatten before")
                pending = (name, module)
            elif kind in _BATCH_NORMS:
                if pending is None:
                    raise _unsupported(name, module, "expected a Conv2d or Linear before it")
                pending = (pending[0], _fold(pending[1], name, module))
            elif kind is FusedLIF:
                if pending is None:
                    raise _unsupported(name, module, "expected a Conv2d or Linear before it")
                self._add(_neurons(_synapses(*pending, self.divisor), name, module))
                pending = None
            elif kind in (nn.AvgPool2d, nn.MaxPool2d):
                self._check_spikes(name, module)
                if kind is nn.MaxPool2d:
                    self.layers.append(Layer("max_pool", name, _max_window(name, module)))
                else:
                    window = _average_window(name, module)
                    self.divisor *= math.prod(window.kernel)
                    self.layers.append(Layer("average_pool", name, window))
            elif kind is ResidualBlock:
                self._check_spikes(name, module)
                self._add_block(name, module)
            else:
                raise _unsupported(name, module, "the event engine has no such module")
        return pending

    def _check_spikes(self, name: str, module: nn.Module) -> None:
        if not self.layers or self.flat:
            wanted = "no Flatten" if self.flat else "a FusedLIF"
            raise _unsupported(name, module, f"expected {wanted} before it")

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self.divisor = 1

    def _add_block(self, name: str, block: nn.Module) -> None:
        assert isinstance(block, ResidualBlock)
        entry, divisor = len(self.layers) - 1, self.divisor
        last = self.read(_leaves(block.main, f"{name}.main"))
        short = _Reader()
        way = short.read(_leaves(block.shortcut, f"{name}.shortcut"))
        if last is None or short.layers or not isinstance(block.neuron, FusedLIF):
            raise _unsupported(
                name, block, "expected conv, FusedLIF, conv; no neurons beside; a FusedLIF after"
            )
        layer = _synapses(*last, self.divisor)
        layer.shortcut, layer.shortcut_unit = entry, 1 / divisor
        if way is not None:
            beside = _synapses(*way, divisor)
            if beside.groups != 1:
                raise _unsupported(*way, f"expected groups=1, got {beside.groups}")
            assert layer.bias is not None
            assert beside.bias is not None
            layer.bias = layer.bias + beside.bias
            layer.shortcut_weight, layer.shortcut_window = beside.weight, beside.window
        self._add(_neurons(layer, f"{name}.neuron", block.neuron))


def _fold(layer: nn.Module, name: str, norm: nn.Module) -> nn.Module:
    try:
        both = folded(layer, norm)
    except ValueError as error:
        raise _unsupported(name, norm, str(error)) from error
    if both is None:
        raise _unsupported(name, norm, f"cannot follow {type(layer).__name__}")
    return both


def _synapses(name: str, module: nn.Module, divisor: int) -> Layer:
    """A Conv2d or Linear; `divisor`: what the average pools before it left to be divided by."""
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    weight = (module.weight.detach().double() / divisor).float().cpu()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float().cpu()
    layer = Layer("linear", name, weight=weight.contiguous(), bias=bias.clone())
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise _unsupported(
                name, module, f"expected padding with zeros, got {module.padding_mode}"
            )
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before = (total[0] // 2, total[1] // 2)
            after = (total[0] - before[0], total[1] - before[1])
        else:
            before = after = (0, 0) if module.padding == "valid" else _pair(module.padding)
        layer.window = Window(kernel, _pair(module.stride), dilation, before, after)
        layer.kind, layer.groups = "conv", module.groups
    check_finite(layer)
    return layer


def _neurons(layer: Layer, name: str, module: nn.Module) -> Layer:
    assert isinstance(module, FusedLIF)
    assert layer.bias is not None
    for option in ("stateful", "packed", "return_v"):
        if getattr(module, option):
            raise _unsupported(name, module, f"expected {option}=False")
    outputs = len(layer.bias)
    for key in ("threshold", "leak"):
        value = getattr(module, key).detach().float().cpu().reshape(-1)
        if value.numel() not in (1, outputs):
            raise _unsupported(
                name, module, f"{key}: expected 1 element or {outputs}, got {value.numel()}"
            )
        setattr(layer, key, value.expand(outputs).clone())
    layer.reset, layer.v_reset = module.reset, float(module.v_reset)
    check_finite(layer)
    return layer


def _max_window(name: str, module: nn.Module) -> Window:
    assert isinstance(module, nn.MaxPool2d)
    for option in ("ceil_mode", "return_indices"):
        if getattr(module, option):
            raise _unsupported(name, module, f"expected {option}=False")
    return _pool_window(module, _pair(module.dilation))


def _average_window(name: str, module: nn.Module) -> Window:
    assert isinstance(module, nn.AvgPool2d)
    kernel = _pair(module.kernel_size)
    if module.divisor_override not in (None, math.prod(kernel)):
        raise _unsupported(name, module, "expected no divisor_override")
    if _pair(module.padding) != (0, 0) and not module.count_include_pad:
        raise _unsupported(name, module, "expected count_include_pad=True")
    if module.ceil_mode:
        raise _unsupported(name, module, "expected ceil_mode=False")
    return _pool_window(module, (1, 1))


def _pool_window(module: Any, dilation: tuple[int, int]) -> Window:
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    return Window(kernel, _pair(module.stride), dilation, padding, padding)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
