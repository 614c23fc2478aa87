"""Why spikes of the event engine differ from PyTorch's: a current within rounding of its threshold.

Both add the same weights in another order, so their currents differ by rounding; a neuron whose
exact current lies that close to its threshold may fire in one and not in the other (a root flip),
and then later layers see other spikes (its consequences).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..nn import neurons
from .layer import Layer, Window
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
    for layer, a, b, (exact_a, size_a), (exact_b, size_b) in zip(
        firing, ours, theirs, *walks, strict=True
    ):
        assert layer.threshold is not None
        threshold = layer.threshold.double().view(-1, 1, 1)
        terms = _terms(layer)
        a, b = a[chosen], b[chosen]
        for index in (a != b).nonzero().tolist():
            at = tuple(index)
            limit = float(threshold[at[1]])
            found = []
            for spike, exact, size in ((a, exact_a, size_a), (b, exact_b, size_b)):
                distance = float((exact[at] - limit).abs() / (2.0**-24 * size[at]))
                right = bool(spike[at]) == (float(exact[at]) > limit)
                found.append((distance, right or distance <= terms))
            flips.append(
                Flip(
                    image=int(chosen[at[0]]),
                    layer=layer.name,
                    neuron=int(np.ravel_multi_index(at[1:], a.shape[1:])),
                    root=bool(clean[at[0]]),
                    explained=all(fine for _, fine in found),
                    distance=min(distance for distance, _ in found),
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
    """Additions of a neuron: its weights and its bias, and those of a shortcut."""
    assert layer.weight is not None
    short = 1 if layer.shortcut_weight is None else layer.shortcut_weight[0].numel()
    return layer.weight[0].numel() + 1 + (short if layer.shortcut is not None else 0)


def _currents(
    layers: list[Layer], images: Tensor, spikes: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer with neurons, float64 [B, C, H, W]: the current that the layers before give it
    with these spikes, and the sum of its parts' absolute values."""
    given = iter(spikes)
    values: list[Tensor] = []
    value = images.double()
    for layer in layers:
        if layer.kind == "readout":
            return
        if layer.window is not None and layer.weight is None:
            w = layer.window
            value = F.pad(value, (w.before[1], w.after[1], w.before[0], w.after[0]))
            if layer.kind == "max_pool":
                value = F.max_pool2d(value, w.kernel, w.stride, 0, w.dilation)
            else:
                value = F.avg_pool2d(value, w.kernel, w.stride, divisor_override=1)  # counts
        else:
            assert layer.weight is not None
            assert layer.bias is not None
            bias = layer.bias.double().view(-1, 1, 1)
            exact = _weighted(value, layer.weight.double(), layer.window, layer.groups) + bias
            size = _weighted(value.abs(), layer.weight.double().abs(), layer.window, layer.groups)
            size = size + bias.abs()
            if layer.shortcut is not None:
                beside = values[layer.shortcut]
                if layer.shortcut_weight is None:
                    exact = exact + beside * layer.shortcut_unit
                    size = size + beside * layer.shortcut_unit
                else:
                    weight = layer.shortcut_weight.double()
                    exact = exact + _weighted(beside, weight, layer.shortcut_window, 1)
                    size = size + _weighted(beside, weight.abs(), layer.shortcut_window, 1)
            yield exact, size
            value = next(given).double()
        values.append(value)


def _weighted(value: Tensor, weight: Tensor, window: Window | None, groups: int) -> Tensor:
    if window is None:
        return F.linear(value.flatten(1), weight)[:, :, None, None]
    (top, left), (bottom, right) = window.before, window.after
    value = F.pad(value, (left, right, top, bottom))
    return F.conv2d(value, weight, None, window.stride, 0, window.dilation, groups)
