"""Why spikes of the event engine differ from PyTorch's: a current within rounding of its threshold.

Both add the same weights in another order, so their currents differ by rounding; a neuron whose
exact current lies that close to its threshold may fire in one and not in the other (a root flip),
and then later layers see other spikes (its consequences).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..nn import neurons
from .builder import common_multiple
from .layer import Input, Layer, give_values
from .network import EventNetwork


@dataclass
class Flip:
    """A spike that one network gave and the other did not.

    Attributes:
        image: index in the batch.
        layer: name of the layer with neurons.
        neuron: index in [C, H, W].
        root: all earlier spikes of the image agree, so rounding alone explains it.
        explained: root: the exact current lies within the bound of rounding; else: each network is
            right about its own input spikes, or within that bound.
        distance: |exact current - threshold| in roundings: multiples of 2^-24 * (|bias| + sum of
            |weight| of the spikes), infinite where there are none; of the two networks' inputs, the
            nearer one.
        terms: additions of the neuron; rounding is below `terms` roundings.
    """

    image: int
    layer: str
    neuron: int
    root: bool
    explained: bool
    distance: float
    terms: int


@torch.no_grad()
def trace_flips(net: EventNetwork, model: nn.Module, images: Tensor) -> list[Flip]:
    """Every spike of `images` [B, C, H, W] that `net` and its `model`, in eval mode, disagree on.

    Raises:
        UsageError: T > 1, or weights that are not fp32.
    """
    if net.timesteps != 1 or net.precision != "fp32":
        raise UsageError(
            f"net: expected T = 1 and fp32 weights, got T = {net.timesteps}, {net.precision}"
        )
    net(images)
    ours = [spikes[0] for spikes in net.spikes()]
    theirs = [b.reshape(a.shape) > 0 for a, b in zip(ours, _spikes(model, images), strict=True)]
    differ = torch.stack([(a != b).flatten(1).any(1) for a, b in zip(ours, theirs, strict=True)])
    chosen = differ.any(0).nonzero().flatten()
    if not len(chosen):
        return []
    firing = [layer for layer in net.layers if layer.threshold is not None]
    walks = [
        _currents(net.layers, images[chosen], [s[chosen] for s in each]) for each in (ours, theirs)
    ]
    flips: list[Flip] = []
    clean = torch.ones(len(chosen), dtype=torch.bool)
    for layer, a, b, *found in zip(firing, ours, theirs, *walks, strict=True):
        assert layer.threshold is not None
        threshold = layer.threshold.double().view(-1, 1, 1)
        terms = _terms(layer)
        a, b = a[chosen], b[chosen]
        for index in (a != b).nonzero().tolist():
            at = tuple(index)
            limit = float(threshold[at[1]])
            distances, fine = [], True
            for spike, current in ((a, found[0]), (b, found[1])):
                exact = float(current.exact[at])
                rounding = 2.0**-24 * float(current.size[at])
                distances.append(abs(exact - limit) / rounding if rounding else math.inf)
                right = bool(spike[at]) == (exact > limit)
                fine &= right or abs(exact - limit) <= float(current.error[at])
            flips.append(
                Flip(
                    image=int(chosen[at[0]]),
                    layer=layer.name,
                    neuron=int(np.ravel_multi_index(at[1:], a.shape[1:])),
                    root=bool(clean[at[0]]),
                    explained=fine,
                    distance=min(distances),
                    terms=terms,
                )
            )
        clean &= ~(a != b).flatten(1).any(1)
    return flips


def _spikes(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of each neuron layer at the first timestep, in the order in which they fire: [B, ...]."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, spikes: found.append(spikes[0]))
        for module in neurons(model)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _terms(layer: Layer) -> int:
    """Additions of a neuron: its weights and its bias, and one for each input without weights."""
    return 1 + sum(1 if i.weight is None else i.weight[0].numel() for i in layer.inputs)


@dataclass
class _Value:
    """What a layer gives, float64 [B, C, H, W].

    Attributes:
        exact: without rounding, from the same spikes.
        size: the sum of the absolute values of what was added.
        error: by how much a float32 network may be off it.
    """

    exact: Tensor
    size: Tensor
    error: Tensor


def _currents(layers: list[Layer], images: Tensor, spikes: list[Tensor]) -> Iterator[_Value]:
    """Of each layer with neurons the current that the layers before it give it, all neurons having
    fired as `spikes` says."""
    given = iter(spikes)
    values, real = [_certain(images.double())], give_values(layers)
    for layer in layers:
        inputs = [values[each.source] for each in layer.inputs]
        if layer.kind in ("readout", "output"):
            return
        if layer.kind == "neurons":
            yield _sum(layer, inputs)
            value = _certain(next(given).double())
        elif layer.kind == "currents":
            value = _sum(layer, inputs)
        elif layer.kind == "channels":
            value = _joined(layer, inputs)
        elif layer.kind == "sum":
            times = [each.times for each in layer.inputs]
            parts = [n * v.exact for n, v in zip(times, inputs, strict=True)]
            value = _certain(torch.stack(parts).sum(0))
        else:
            value = _pooled(layer, inputs[0], real[layer.inputs[0].source])
        values.append(value)


def _certain(exact: Tensor) -> _Value:
    return _Value(exact, exact.abs(), torch.zeros_like(exact))


def _sum(layer: Layer, inputs: list[_Value]) -> _Value:
    assert layer.bias is not None
    exact = layer.bias.double().view(-1, 1, 1)
    size, error = exact.abs(), torch.zeros_like(exact)
    for each, value in zip(layer.inputs, inputs, strict=True):
        if each.weight is None:
            exact = exact + value.exact * each.unit
            size = size + value.exact.abs() * abs(each.unit)
            error = error + value.error * abs(each.unit)
        else:
            weight = each.weight.double()
            exact = exact + _weighted(value.exact, weight, each)
            size = size + _weighted(value.exact.abs(), weight.abs(), each)
            error = error + _weighted(value.error, weight.abs(), each)
    return _Value(exact, size, error + _terms(layer) * 2.0**-24 * (size + error))


def _joined(layer: Layer, inputs: list[_Value]) -> _Value:
    parts = []
    for each, value in zip(layer.inputs, inputs, strict=True):
        taken = slice(each.first, each.first + each.channels)
        parts.append([t[:, taken] * each.unit for t in (value.exact, value.size, value.error)])
    exact, size, error = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return _Value(exact, size, error + 2.0**-24 * exact.abs())


def _pooled(layer: Layer, value: _Value, real: bool) -> _Value:
    """Counts as they are in the engine, or averages of real values."""
    if layer.kind == "adaptive_pool":
        assert layer.size is not None
        size, have = layer.size, value.exact.shape[2:]
        rows, columns = (common_multiple(*each) for each in zip(have, size, strict=True))
        times = 1 if real else rows * columns

        def pool(x: Tensor) -> Tensor:
            return times * F.adaptive_avg_pool2d(x, size)

    else:
        assert layer.window is not None
        w = layer.window

        def pool(x: Tensor) -> Tensor:
            lowest = -math.inf if real and layer.kind == "max_pool" else 0.0
            x = F.pad(x, (w.before[1], w.after[1], w.before[0], w.after[0]), value=lowest)
            if layer.kind == "max_pool":
                return F.max_pool2d(x, w.kernel, w.stride, 0, w.dilation)
            return F.avg_pool2d(x, w.kernel, w.stride, divisor_override=None if real else 1)

    exact = pool(value.exact)
    if not real:
        return _certain(exact.round())
    largest = exact.abs() if layer.kind == "max_pool" else pool(value.size)
    return _Value(exact, largest, pool(value.error) + 2.0**-20 * largest)


def _weighted(value: Tensor, weight: Tensor, given: Input) -> Tensor:
    if given.window is None:
        return F.linear(value.flatten(1), weight)[:, :, None, None]
    (top, left), (bottom, right) = given.window.before, given.window.after
    value = F.pad(value, (left, right, top, bottom))
    w = given.window
    return F.conv2d(value, weight, None, w.stride, 0, w.dilation, given.groups)
