"""Conv2d, Linear and AvgPool2d for training on spikes: less memory kept, additions for products.

`SpikeConv2d` and `SpikeLinear` are nn.Conv2d and nn.Linear (same arguments, parameters, state_dict
and results within rounding) whose input is expected to be spikes. What they keep for the backward
pass is not the input but its bits, or 8-bit counts where it was average-pooled; and on a CPU they
compute the forward pass and the weight's gradient by events, one addition of a row of weights (or
of gradients) for each spike, where spikes are sparse enough to gain from it. An input of another
kind is kept as it is and computed as torch does: never wrong, only no cheaper.

Events: float32 and bfloat16 (sums in float32) on a CPU with iirsnn._C, where an input's values tell
its kind. Elsewhere products are torch's own, and where an input comes from tells its kind (see
origin.py). There is no second derivative. Under torch.compile each such layer is a graph break.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler's imports torch._dynamo at once

from ..errors import check_choice
from ..ops.backend import direct, why_not
from .neuron import FusedLIF
from .origin import Origin, average, origin
from .products import LINEAR, Geometry
from .spike_convolution import (
    Decision,
    by_events_or_dense,
    dense,
    memory_format,
    without_events,
)

#: How a layer chooses between events and dense products.
MODES = ("auto", "events", "dense")


_autocast_available = functools.cache(torch.amp.is_autocast_available)


def _graph_break(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method that torch.compile does not look into; where it is not at work, for nothing."""
    outside = _disable_dynamo(forward)

    @functools.wraps(forward)
    def run(*args: Any, **named: Any) -> Tensor:
        chosen = outside if torch.compiler.is_compiling() else forward
        return chosen(*args, **named)

    return run


class _SpikeLayer:
    """What the layers have in common; comes first among a layer's base classes.

    Attributes:
        mode: auto, events or dense.
        decision: of the last forward pass; None before the first.
    """

    mode: str = "auto"
    decision: Decision | None = None

    def set_mode(self, mode: str) -> None:
        """Choose between events and dense products: auto, events or dense.

        Raises:
            ValueError: another mode.
        """
        check_choice("mode", mode, MODES)
        self.mode = mode

    def decide(self, decision: Decision) -> None:
        """Say what was done."""
        object.__setattr__(self, "decision", decision)  # a module's own looks for parameters first

    def _no_events(self, x: Tensor, dtype: torch.dtype) -> str | None:
        """Why events cannot run; None where they can."""
        if x.device.type != "cpu":
            return f"events run on a CPU, got a tensor on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16) or dtype not in (
            torch.float32,
            torch.bfloat16,
        ):
            return f"expected float32 or bfloat16, got {x.dtype} and a weight of {dtype}"
        return why_not("cpu", "cpu")

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> _Product | None:
        """The function that computes the layer, with the parameters as autocast would have them.

        None where torch's own layer has to run.
        """
        device, dtype = x.device.type, weight.dtype
        if _autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        reason, known = self._no_events(x, dtype), None
        if reason is not None:
            if weight.requires_grad and torch.is_grad_enabled():
                known = origin(x)
            self.decide(without_events("tensor" if known is None else known.name, reason))
            if known is None:
                return None
        if weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if known is None:
            return lambda x, geometry: by_events_or_dense(x, weight, bias, self, geometry)
        return lambda x, geometry: dense(x, weight, bias, known, geometry)


#: (x [N, C, H, W], or [..., C] of a linear layer, geometry) -> output
_Product = Callable[[Tensor, Geometry], Any]


class SpikeConv2d(_SpikeLayer, nn.Conv2d):
    """nn.Conv2d for an input of spikes; see the module's text.

    x: [N, C, H, W] or [C, H, W], any layout (on a CPU channels_last is what it computes in). Kept
       as bits where its values are 0 and one other number (spikes, or spikes after dropout), as
       uint8 counts where they are 0..255 times one number (average-pooled spikes), else as it is.
       Where events cannot run, on a GPU above all, that is known of spikes by the neurons of this
       package, however sliced, joined, max-pooled, added, or averaged over 2, 4, 8... of them.
    Returns what nn.Conv2d returns. `decision` tells how it was computed, and why.
    """

    @_graph_break
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = self._product(input, weight, bias)
        if product is None:
            dense: Tensor = super()._conv_forward(input, weight, bias)
            return dense
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            left, right, top, bottom = self._reversed_padding_repeated_twice
            padding = (top, left)
            if self.padding_mode != "zeros" or (left, top) != (right, bottom):
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                input, padding = F.pad(input, [left, right, top, bottom], mode=mode), (0, 0)
        sizes = tuple(self.stride), tuple(padding), tuple(self.dilation)
        geometry = Geometry(*sizes, self.groups)
        x = input if input.dim() == 4 else input.unsqueeze(0)
        out: Tensor = product(x, geometry)
        return out if input.dim() == 4 else out.squeeze(0)


class SpikeLinear(_SpikeLayer, nn.Linear):
    """nn.Linear for an input of spikes; see the module's text.

    x: [..., in_features]. `decision` tells how it was computed, and why.
    """

    @_graph_break
    def forward(self, input: Tensor) -> Tensor:
        fits = input.dim() > 0 and input.shape[-1] == self.in_features  # else torch's layer says so
        product = self._product(input, self.weight, self.bias) if fits else None
        out: Tensor = super().forward(input) if product is None else product(input, LINEAR)
        return out


# ---- The pool ----


class _AveragePool(torch.autograd.Function):
    """The twin of csrc/spike/torch/average_pool.h, for where that is not compiled or not taken."""

    @staticmethod
    def origin(node: Any) -> Origin | None:
        kernel, _, *options = node.options
        return average(node, kernel, *options)

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any) -> Tensor:
        ctx.options, ctx.size, ctx.format = options, x.shape, memory_format(x)
        return F.avg_pool2d(x, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kernel, stride, padding, ceil_mode, _, divisor = ctx.options
        height, width = (n * k for n, k in zip(grad.shape[2:], kernel, strict=True))
        tiles = kernel == stride and not any(padding) and not ceil_mode and divisor is None
        if tiles and (height, width) == tuple(ctx.size[2:]):  # the same, and faster
            return F.interpolate(grad / (kernel[0] * kernel[1]), (height, width)), None
        # of x only size and layout are read
        x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        return torch.ops.aten.avg_pool2d_backward(grad, x, *ctx.options), None


class SpikeAvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d that keeps nothing of its input [N, C, H, W]; torch's keeps all of it."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        pool = None if torch.compiler.is_compiling() else direct("spike_average_pool")
        if pool is not None:
            sizes = self.kernel_size, self.stride, self.padding
            how = self.ceil_mode, self.count_include_pad, self.divisor_override
            out = pool(input, *sizes, *how)
            if out is not None:
                return out  # type: ignore[no-any-return]
        kernel, stride, padding = (
            [n, n] if isinstance(n, int) else list(n)
            for n in (self.kernel_size, self.stride, self.padding)
        )
        options = (
            kernel,
            stride,
            padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        averaged: Tensor = _AveragePool.apply(input, options)
        return averaged


# ---- Whole networks ----

_SPIKE_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SpikeConv2d,
    nn.Linear: SpikeLinear,
    nn.AvgPool2d: SpikeAvgPool2d,
}


def use_spike_layers(network: nn.Module, mode: str = "auto") -> nn.Module:
    """Make the layers after a network's first neurons spike layers, in place.

    Parameters, their names and the optimiser's hold on them stay; `use_plain_layers` undoes it.
    The first layer, which sees the image, stays as it is. On a CPU the parameters become
    channels_last, the layout that events are computed in: otherwise each layer's input and output
    would be turned from one into the other.

    Args:
        network: e.g. what `iirsnn.convert` returns.
        mode: auto, events or dense.

    Returns:
        The network.

    Raises:
        ValueError: an unknown mode.
    """
    check_choice("mode", mode, MODES)
    spiking = changed = False
    for module in network.modules():
        spiking = spiking or isinstance(module, FusedLIF)
        if spiking and type(module) in _SPIKE_LAYERS:
            module.__class__ = _SPIKE_LAYERS[type(module)]
            changed = True
            if isinstance(module, _SpikeLayer):
                module.set_mode(mode)
    if changed and all(parameter.device.type == "cpu" for parameter in network.parameters()):
        network.to(memory_format=torch.channels_last)
    return network


def use_plain_layers(network: nn.Module) -> nn.Module:
    """Undo `use_spike_layers`, in place: the layers are torch's own again, in the same layout."""
    plain = {spike: torch_layer for torch_layer, spike in _SPIKE_LAYERS.items()}
    for module in network.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            for name in ("mode", "decision"):
                module.__dict__.pop(name, None)
    return network
