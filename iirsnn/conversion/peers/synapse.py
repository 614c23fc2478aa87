"""The synaptic current in front of a neuron: an exponential filter over time, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def filtered(x: Tensor, i0: Tensor | None, decay: float | Tensor) -> Tensor:
    """i[t] = decay i[t-1] + x[t] for t = 0 .. T-1, with `decay i[-1]` given as i0 [*neurons].

    x, i: [T, *neurons]. decay: a number or a tensor of one element. Differentiable in all three.
    """
    return _Filtered.apply(x, i0, decay)


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, i0: Tensor | None, decay: Any) -> Tensor:
        i = x.clone()
        if i0 is not None:
            i[0] += i0
        for t in range(1, x.shape[0]):
            i[t] += decay * i[t - 1]
        learned = isinstance(decay, Tensor)
        ctx.number = None if learned else decay
        ctx.save_for_backward(*((i, decay) if learned else ()))
        return i

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        i, decay = ctx.saved_tensors or (grad, ctx.number)
        of_x = grad.clone()
        for t in reversed(range(grad.shape[0] - 1)):
            of_x[t] += decay * of_x[t + 1]
        of_decay = None
        if ctx.needs_input_grad[2]:
            of_decay = (of_x[1:] * i[:-1]).sum().reshape(decay.shape)
        return of_x, of_x[0] if ctx.needs_input_grad[1] else None, of_decay
