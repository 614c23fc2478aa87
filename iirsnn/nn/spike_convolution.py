"""The convolution of spike layers and its gradients: by events, or as torch's own products."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import choose, direct
from . import events_or_dense
from .origin import Layout, Origin, half_for
from .products import LINEAR, Geometry, Work, dense_backward, dense_forward
from .spike_packing import pack

_SAMPLE = 2**17  # values of a gradient, or those of four images, that tell its density


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


@functools.lru_cache(maxsize=64)  # a layer asks in every step
def without_events(kept: str, reason: str) -> Decision:
    """Where events cannot run."""
    return Decision(kept, "dense", "dense", float("nan"), reason)


def by_events_or_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, geometry: Geometry
) -> Tensor:
    """The output of a spike layer on a CPU, which decides how by the values of x."""
    function: Any = Linear if geometry is LINEAR else Convolution
    out: Tensor = function.apply(x, weight, bias, layer, geometry)
    return out


def dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, known: Origin, geometry: Geometry
) -> Tensor:
    """The output of a spike layer by torch's own products, on any device, for an x that is known.

    The compiled way has no Python in its backward pass; DenseConvolution is its twin.
    """
    call = direct("spike_product")
    if call is not None:
        half, shape = half_for(x), None if geometry is LINEAR else geometry
        out = call(x, weight, bias, known.most, known.divisor, half, "auto", shape)
        if out is None:  # Triton's kernels, or none for the values of x are
            name = choose("auto", x.device).name
            out = call(x, weight, bias, known.most, known.divisor, half, name, shape)
        if out is not None:
            return out  # type: ignore[no-any-return]
    if geometry is not LINEAR:
        return DenseConvolution.apply(x, weight, bias, known, geometry)  # type: ignore[no-any-return]
    flat = x.reshape(x.shape[:-1].numel(), weight.shape[1], 1, 1)
    out = DenseConvolution.apply(flat, weight[..., None, None], bias, known, geometry)
    return out.reshape(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


class Convolution(torch.autograd.Function):
    """x [N, C, H, W] and its layer's parameters -> [N, K, H', W'] in the weight's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, geometry: Any
    ) -> Tensor:
        ctx.geometry, ctx.size, ctx.x_dtype = geometry, list(x.shape), x.dtype
        ctx.mode, ctx.layer = layer.mode, layer
        ctx.x_format = memory_format(x)
        packed = pack(x) if x.numel() else None
        if packed is None:
            layer.decide(without_events("tensor", "the input is neither spikes nor counts"))
            ctx.save_for_backward(x, weight, None)
            ctx.by_events, ctx.work = False, None
            return dense_forward(x, weight, bias, geometry)
        kind, (bits, table, nonzeros) = packed
        density = nonzeros / x.numel()
        name = "counts" if kind.counts else "bits"
        # numbers under torch.jit.trace too
        ctx.work = work = Work(tuple(map(int, x.shape)), tuple(map(int, weight.shape)), geometry)
        ways, reason = events_or_dense.decide(layer.mode, name, density, work, weight.dtype)
        layer.decide(Decision(name, *ways, density=density, reason=reason))
        ctx.save_for_backward(bits, weight, table)
        ctx.by_events = ways[1] == "events"
        if ways[0] == "dense":
            return dense_forward(x, weight, bias, geometry)
        out: Tensor = torch.ops.iirsnn.spike_conv2d(bits, table, ctx.size, weight, bias, *geometry)
        last = torch.channels_last in (ctx.x_format, memory_format(weight))
        return out if last else out.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        kept, weight, table = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        layout = torch.contiguous_format
        if table is not None or torch.channels_last in (ctx.x_format, memory_format(weight)):
            layout = torch.channels_last  # that of unpacked spikes
            grad = grad.contiguous(memory_format=layout)  # once for all products
        if need_bias:
            grad_bias = grad.sum((0, 2, 3)).to(weight.dtype)  # sums of bfloat16 are float32 inside
        if need_weight and ctx.by_events:
            grad_weight = torch.ops.iirsnn.spike_conv2d_weight(
                kept, table, ctx.size, grad, weight.shape, *ctx.geometry
            )
        elif need_weight:
            x = (
                kept.to(weight.dtype)
                if table is None
                else torch.ops.iirsnn.spike_unpack(kept, table, ctx.size, weight.dtype)
            )
            grad_weight = dense_backward(grad, x, weight, ctx.geometry, [False, True, False])[1]
            del x  # before its gradient takes as much
        if need_x and _input_by_events(ctx, grad, weight):
            grad_x = torch.ops.iirsnn.spike_conv2d_input(grad, weight, ctx.size, *ctx.geometry[1:])
        elif need_x:
            x = torch.empty(ctx.size, dtype=weight.dtype, memory_format=layout)
            grad_x = dense_backward(grad, x, weight, ctx.geometry, [True, False, False])[0]
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class Linear(torch.autograd.Function):
    """x [..., C] and its layer's parameters -> [..., K]: a 1x1 convolution of 1x1 images.

    A function of its own, as views that autograd knows of cost as much as the product of few.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, geometry: Any
    ) -> Tensor:
        ctx.shape, (outputs, inputs) = x.shape, weight.shape
        images = x.reshape(x.shape[:-1].numel(), inputs, 1, 1)
        out = Convolution.forward(ctx, images, weight[..., None, None], bias, layer, geometry)
        return out.reshape(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        images = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1], 1, 1)
        grad_x, grad_weight, *rest = Convolution.backward(ctx, images)
        if grad_x is not None:
            grad_x = grad_x.reshape(ctx.shape)
        return grad_x, None if grad_weight is None else grad_weight.flatten(1), *rest


class DenseConvolution(torch.autograd.Function):
    """The same by torch's own products, on any device, for an x of which it is known what it is.

    Linear layers come as 1x1 convolutions of 1x1 images.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: Origin, geometry: Any
    ) -> Tensor:
        ctx.known, ctx.layout, ctx.geometry = known, Layout.of(x), geometry
        ctx.save_for_backward(known.pack(x), weight)
        return dense_forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        packed, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        x = ctx.known.unpack(packed, ctx.layout) if mask[1] else ctx.layout.empty(grad.device)
        grad_x, *grads = dense_backward(grad, x.to(weight.dtype), weight, ctx.geometry, mask)
        return None if grad_x is None else grad_x.to(ctx.layout.dtype), *grads, None, None


def _refuse_second() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "iirsnn: expected one backward pass through a spike layer, got one that is to be "
            "differentiated again (create_graph=True)"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _input_by_events(ctx: Any, grad: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of x is to be computed by the events of the output's gradient."""
    work = ctx.work
    if work is None or ctx.geometry.stride != (1, 1):
        return False
    if weight.dtype != torch.float32 or not grad.numel():
        return False

    def density() -> float:
        sample = grad[:: max(1, min(grad.shape[0] // 4, grad.numel() // _SAMPLE))]
        return torch.count_nonzero(sample).item() / sample.numel()

    events = events_or_dense.input_by_events(ctx.mode, density, work, weight.dtype)
    if getattr(ctx.layer, "decision", None) is not None:  # it may be torch's own again
        chosen = "events" if events else "dense"
        ctx.layer.decide(replace(ctx.layer.decision, input_grad=chosen))
    return events
