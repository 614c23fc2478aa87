"""LIF whose surrogate is a function of another library: kernels forward, plain torch backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...functional import lif
from ...ops.reference import acc_dtype

Derivative = Callable[[Tensor, Any], Tensor]  # of h and the threshold


def lif_with_derivative(
    x: Tensor,
    threshold: float | Tensor,
    fires_above: float | Tensor,
    leak: float | Tensor,
    v0: Tensor | None,
    v_reset: float,
    derivative: Derivative,
    reset: str,
    detach_reset: bool,
) -> tuple[Tensor, Tensor]:
    """`iirsnn.functional.lif`, but ds/dh = derivative(h, threshold). Spikes and the last membrane.

    x [T, *neurons]; threshold, leak: numbers, or tensors that broadcast to v0 [*neurons].
    fires_above: what the kernels compare with, the threshold or its neighbour; it gets no gradient.
    Backward recomputes the membranes and keeps what forward keeps, x and s.
    """
    return _Lif.apply(x, threshold, leak, v0, fires_above, v_reset, derivative, reset, detach_reset)


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, threshold, leak, v0, fires_above, v_reset, derivative, reset, detach_reset):
        s, v = lif(x, fires_above, leak, v0, reset=reset, v_reset=v_reset, return_v=True)
        tensors = [p if isinstance(p, Tensor) else None for p in (threshold, leak)]
        ctx.save_for_backward(x, *tensors, v0, s)
        ctx.numbers = threshold, leak
        ctx.options = v_reset, derivative, reset, detach_reset
        return s, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s, grad_v):
        x, *parameters, v0, s = ctx.saved_tensors
        threshold, leak = (
            number if tensor is None else tensor
            for number, tensor in zip(ctx.numbers, parameters, strict=True)
        )
        grads = _backward(grad_s, grad_v, x, threshold, leak, v0, s, *ctx.options)
        wanted = zip(grads, ctx.needs_input_grad[:4], strict=True)
        return *(grad if needed else None for grad, needed in wanted), *[None] * 5


def _backward(
    grad_s: Tensor,
    grad_v: Tensor,
    x: Tensor,
    threshold: Any,
    leak: Any,
    v0: Tensor | None,
    s: Tensor,
    v_reset: float,
    derivative: Derivative,
    reset: str,
    detach_reset: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, threshold, leak and v0; grad_v [*neurons] is that of the last membrane."""
    acc = acc_dtype(x.dtype)
    s, grad_s = s.to(acc), grad_s.to(acc)
    delayed = reset == "soft_delayed"
    before = (v0 > threshold).to(acc) if delayed and v0 is not None else None

    def after_reset(t: int) -> Tensor | None:
        if t < 0:
            return v0
        if reset == "soft":
            return h[t] - threshold * s[t]
        return h[t].masked_fill(s[t] == 1, v_reset) if reset == "hard" else h[t]

    h = torch.empty(x.shape, dtype=acc, device=x.device)
    for t in range(x.shape[0]):
        v = after_reset(t - 1)
        h[t] = x[t] if v is None else leak * v + x[t]
        fired = s[t - 1] if t else before
        if delayed and fired is not None:
            h[t] -= threshold * fired

    # One timestep after the other: what is computed for one stays in the cache.
    grad_x = torch.empty_like(h)
    zeros = torch.zeros_like(h[0])
    of_threshold = zeros.clone() if isinstance(threshold, Tensor) else None
    of_leak = zeros.clone() if isinstance(leak, Tensor) else None
    grad_after, of_next = grad_v.to(acc), zeros  # of v[t]; of h[t + 1]
    for t in reversed(range(x.shape[0])):
        of_spike, straight = grad_s[t], grad_after
        subtracted = None
        if reset == "hard":
            straight = grad_after.masked_fill(s[t] == 1, 0)
            if not detach_reset:
                of_spike = of_spike + (v_reset - h[t]) * grad_after
        elif reset != "none":
            subtracted = of_next if delayed else grad_after
            if not detach_reset:
                of_spike = of_spike - threshold * subtracted
        surrogate = of_spike * derivative(h[t], threshold).to(acc)
        if of_threshold is not None:
            of_threshold -= surrogate
            if subtracted is not None:
                of_threshold -= subtracted * s[t]
        of_next = torch.add(straight, surrogate, out=grad_x[t])
        v = after_reset(t - 1) if of_leak is not None else None
        if of_leak is not None and v is not None:
            of_leak += of_next * v
        grad_after = leak * of_next
    if v0 is not None and before is not None:
        surrogate = torch.zeros_like(zeros)
        if not detach_reset:
            surrogate = -threshold * of_next * derivative(v0, threshold).to(acc)
            grad_after = grad_after + surrogate
        if of_threshold is not None:
            of_threshold -= surrogate + of_next * before
    return (
        grad_x.to(x.dtype),
        _summed(of_threshold, threshold),
        _summed(of_leak, leak),
        grad_after,
    )


def _summed(of_neurons: Tensor | None, parameter: Any) -> Tensor | None:
    if of_neurons is None:
        return None
    return of_neurons.sum_to_size(parameter.shape).to(parameter.dtype)
