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
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler's imports torch._dynamo at once

from ..errors import check_choice
from ..ops.backend import why_not
from . import events_or_dense
from .neuron import FusedLIF
from .origin import Layout, Origin, average, origin

#: How a layer chooses between events and dense products.
MODES = ("auto", "events", "dense")

_PROBE = 4096  # values that a guess of the input's kind looks at


@dataclass(frozen=True)
class Decision:
    """What a layer did in its last forward pass, and why.

    Attributes:
        kept: bits, counts or tensor: what was kept of the input.
        forward, weight_grad: events or dense.
        input_grad: the same, of the last backward pass, by the density of the output's gradient
            (zero where no surrogate gradient reached a neuron); "" before the first.
        density: fraction of the input that is not 0; nan where it was not counted.
        reason: one line.
    """

    kept: str
    forward: str
    weight_grad: str
    density: float
    reason: str
    input_grad: str = ""


# ---- Packing ----


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for calls that need gradients
def _table(unit: float, divisor: int, dtype: torch.dtype) -> Tensor:
    """float32 [256]: the value of a count: k / divisor where there is one, else k * unit."""
    counts = torch.arange(256, dtype=torch.float32)
    values = counts / divisor if divisor else counts * unit
    return values.to(dtype).float()


@dataclass(frozen=True)
class _Kind:
    """What an input may be: bits or counts, and their unit."""

    counts: bool
    unit: float
    divisor: int = 0

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """(packed, table, values that are not 0), or None where x is something else."""
        table = _table(self.unit, self.divisor, x.dtype)
        packed, stats = torch.ops.iirsnn.spike_pack(x, table, self.counts)
        exact, nonzeros = stats.tolist()
        return (packed, table, nonzeros) if exact else None


def _guesses(x: Tensor) -> list[_Kind]:
    """What x [N, C, H, W] may be, from a sample of its values."""
    values = (x.permute(0, 2, 3, 1) if not x.is_contiguous() else x).reshape(-1)
    sample = values[:: max(1, values.numel() // _PROBE)].float()
    found = sample[sample != 0].unique()[:256].tolist()
    if not found:
        return [_Kind(False, 1.0)]
    if found[0] < 0 or not found[-1] < float("inf"):
        return []
    units = dict.fromkeys([found[0], *(b - a for a, b in itertools.pairwise(found))])
    guesses = [_Kind(False, found[0])] if len(found) == 1 else []
    for unit in sorted(units)[:3]:
        if found[-1] / unit < 255.5:
            guesses.append(_Kind(True, unit))
            if unit < 1:
                guesses.append(_Kind(True, unit, round(1 / unit)))
    return guesses


def _pack(x: Tensor) -> tuple[_Kind, tuple[Tensor, Tensor, int]] | None:
    """x packed as what it is, by its values alone; None: it is neither spikes nor counts."""
    for kind in _guesses(x):
        result = kind.pack(x)
        if result is not None:
            return kind, result
    return None


# ---- The convolution ----


class _Convolution(torch.autograd.Function):
    """x [N, C, H, W] and its layer's parameters -> [N, K, H', W'] in the weight's dtype.

    Linear layers come as 1x1 convolutions of 1x1 images.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, geometry: Any
    ) -> Tensor:
        ctx.geometry, ctx.size, ctx.x_dtype, ctx.layer = geometry, list(x.shape), x.dtype, layer
        ctx.x_format = _format(x)
        packed = _pack(x) if x.numel() else None
        if packed is None:
            layer.decision = Decision(
                "tensor", "dense", "dense", float("nan"), "the input is neither spikes nor counts"
            )
            ctx.save_for_backward(x, weight, None)
            ctx.kept = ctx.by_events = ctx.addressable = False
            return _dense_forward(x, weight, bias, geometry)
        kind, (bits, table, nonzeros) = packed
        density = nonzeros / x.numel()
        name = "counts" if kind.counts else "bits"
        positions = geometry.positions(x, weight)
        work = events_or_dense.product(weight, geometry.groups, x.shape[0], positions)
        ways, reason = events_or_dense.decide(layer.mode, name, density, work, weight.dtype)
        ctx.addressable = geometry.addressable(x, weight)
        if not ctx.addressable:
            ways, reason = ("dense", "dense"), "events cannot address images of this size"
        layer.decision = Decision(name, *ways, density=density, reason=reason)
        ctx.save_for_backward(bits, weight, table)
        ctx.kept, ctx.by_events = True, ways[1] == "events"
        if ways[0] == "dense":
            return _dense_forward(x, weight, bias, geometry)
        out: Tensor = torch.ops.iirsnn.spike_conv2d(bits, table, ctx.size, weight, bias, *geometry)
        last = torch.channels_last in (ctx.x_format, _format(weight))
        return out if last else out.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        kept, weight, table = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if need_weight and ctx.by_events:
            grad_weight = torch.ops.iirsnn.spike_conv2d_weight(
                kept, table, ctx.size, grad, weight.shape, *ctx.geometry
            )
        if need_bias:
            grad_bias = grad.sum((0, 2, 3)).to(weight.dtype)  # sums of bfloat16 are float32 inside
        if need_x and _input_by_events(ctx, grad, weight):
            _, padding, dilation, groups = ctx.geometry
            grad_x = torch.ops.iirsnn.spike_conv2d_input(
                grad, weight, ctx.size, padding, dilation, groups
            )
            need_x = False
        dense_weight = need_weight and not ctx.by_events
        if need_x or dense_weight:
            if not dense_weight:
                x = torch.empty(ctx.size, dtype=weight.dtype, memory_format=torch.channels_last)
            elif ctx.kept:
                x = torch.ops.iirsnn.spike_unpack(kept, table, ctx.size, weight.dtype)
            else:
                x = kept.to(weight.dtype)
            mask = [need_x, dense_weight, False]
            grads = _dense_backward(grad, x, weight, ctx.geometry, mask)
            grad_x = grads[0] if need_x else grad_x
            grad_weight = grads[1] if dense_weight else grad_weight
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class _DenseConvolution(torch.autograd.Function):
    """The same by torch's own products, on any device, for an x of which it is known what it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: Origin, geometry: Any
    ) -> Tensor:
        ctx.known, ctx.layout, ctx.geometry = known, Layout.of(x), geometry
        ctx.save_for_backward(known.pack(x), weight)
        return _dense_forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        packed, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        x = ctx.known.unpack(packed, ctx.layout) if mask[1] else ctx.layout.empty(grad.device)
        grad_x, *grads = _dense_backward(grad, x.to(weight.dtype), weight, ctx.geometry, mask)
        return None if grad_x is None else grad_x.to(ctx.layout.dtype), *grads, None, None


def _refuse_second() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "iirsnn: expected one backward pass through a spike layer, got one that is to be "
            "differentiated again (create_graph=True)"
        )


class _Geometry(tuple[Any, ...]):
    """(stride, padding, dilation, groups) of a convolution, the first three pairs."""

    @property
    def groups(self) -> int:
        return int(self[3])

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Of the output of one image of x."""
        rows, columns = self._output(x, weight)
        return rows * columns

    def addressable(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels of events take images of this size: their offsets have 32 bits."""
        (height, width), (out_height, out_width) = x.shape[2:], self._output(x, weight)
        positions = max(height, out_height) * (width + out_width)
        return 192 * max(width, out_width) < 2**25 and positions < 2**25

    def _output(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                x.shape[2:], weight.shape[2:], *self[:3], strict=True
            )
        )
        return rows, columns


_LINEAR = _Geometry(([1, 1], [0, 0], [1, 1], 1))


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _input_by_events(ctx: Any, grad: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of x is to be computed by the events of the output's gradient."""
    layer, stride = ctx.layer, ctx.geometry[0]
    if not ctx.addressable or stride != [1, 1] or weight.dtype != torch.float32 or not grad.numel():
        return False
    sample = grad[:: max(1, grad.shape[0] // 16)]
    density = torch.count_nonzero(sample).item() / sample.numel()
    outputs, channels, rows, columns = weight.shape
    images, _, height, width = ctx.size
    work = events_or_dense.Product(
        outputs // ctx.geometry.groups, channels, rows, columns, images, height * width
    )
    events = events_or_dense.input_by_events(layer.mode, density, work, weight.dtype)
    layer.decision = replace(layer.decision, input_grad="events" if events else "dense")
    return events


def _dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    x = x.to(weight.dtype)
    if x.shape[2:] == weight.shape[2:] == (1, 1) and geometry == _LINEAR:
        return F.linear(x.flatten(1), weight.flatten(1), bias)[..., None, None]
    return F.conv2d(x, weight, bias, *geometry)


def _dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that the mask asks for.

    Where it does not ask for that of the weight, of x the layout alone is read.
    """
    if x.shape[2:] == weight.shape[2:] == (1, 1) and geometry == _LINEAR:
        flat = grad.flatten(1)
        return (
            (flat @ weight.flatten(1))[..., None, None] if mask[0] else None,
            (flat.t() @ x.flatten(1))[..., None, None] if mask[1] else None,
            flat.sum(0) if mask[2] else None,
        )
    stride, padding, dilation, groups = geometry
    size = [weight.shape[0]] if mask[2] else None
    rest = stride, padding, dilation, False, [0, 0], groups, mask
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads = torch.ops.aten.convolution_backward(grad, x, weight, size, *rest)
    return grads


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
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        parameters = weight.to(dtype), None if bias is None else bias.to(dtype)
        reason = self._no_events(x, dtype)
        if reason is None:
            return lambda x, geometry: _Convolution.apply(x, *parameters, self, geometry)
        known = origin(x) if torch.is_grad_enabled() and weight.requires_grad else None
        kept = "tensor" if known is None else known.name
        self.decision = Decision(kept, "dense", "dense", float("nan"), reason)
        if known is None:
            return None
        return lambda x, geometry: _DenseConvolution.apply(x, *parameters, known, geometry)


#: (x [N, C, H, W], geometry) -> output
_Product = Callable[[Tensor, _Geometry], Any]


class SpikeConv2d(_SpikeLayer, nn.Conv2d):
    """nn.Conv2d for an input of spikes; see the module's text.

    x: [N, C, H, W] or [C, H, W], any layout (on a CPU channels_last is what it computes in). Kept
       as bits where its values are 0 and one other number (spikes, or spikes after dropout), as
       uint8 counts where they are 0..255 times one number (average-pooled spikes), else as it is.
       Where events cannot run, on a GPU above all, that is known of spikes by the neurons of this
       package, however sliced, joined, max-pooled, added, or averaged over 2, 4, 8... of them.
    Returns what nn.Conv2d returns. `decision` tells how it was computed, and why.
    """

    @_disable_dynamo
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
        geometry = _Geometry((list(self.stride), list(padding), list(self.dilation), self.groups))
        x = input if input.dim() == 4 else input.unsqueeze(0)
        out: Tensor = product(x, geometry)
        return out if input.dim() == 4 else out.squeeze(0)


class SpikeLinear(_SpikeLayer, nn.Linear):
    """nn.Linear for an input of spikes; see the module's text.

    x: [..., in_features]. `decision` tells how it was computed, and why.
    """

    @_disable_dynamo
    def forward(self, input: Tensor) -> Tensor:
        product = self._product(input, self.weight[..., None, None], self.bias)
        if product is None:
            return super().forward(input)
        x = input.reshape(-1, self.in_features, 1, 1)
        out: Tensor = product(x, _LINEAR)
        return out.reshape(*input.shape[:-1], self.out_features)


# ---- The pool ----


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def origin(node: Any) -> Origin | None:
        kernel, _, *options = node.options
        return average(node, kernel, *options)

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any) -> Tensor:
        ctx.options, ctx.size, ctx.format = options, x.shape, _format(x)
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
