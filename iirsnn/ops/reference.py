"""Plain torch, any float dtype: the definition of correct.

Every kernel of this package is tested against this file. Every operation is rounded on its own; the
two whose gradient is a convention (the spike's surrogate and the hard reset's select) are small
autograd functions, the rest is left to autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .surrogates import SURROGATES

RESETS = ("soft", "hard", "none", "soft_delayed")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of membranes and parameters for a current of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heaviside(h: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(h == h, (h > threshold).to(h.dtype), h)


class _Spike(torch.autograd.Function):
    gives_spikes = True  # see iirsnn/nn/origin.py

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, surrogate: str, scale: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.surrogate, ctx.scale = surrogate, scale
        return _heaviside(h, threshold)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> Any:
        h, threshold = ctx.saved_tensors
        inverse = 1 / threshold
        u = h * inverse
        grad_h = grad_s * (SURROGATES[ctx.surrogate][0](u - 1, ctx.scale) * inverse)
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            grad_threshold = -(grad_h * u).sum_to_size(threshold.shape)
        return grad_h, grad_threshold, None, None


class _HardReset(torch.autograd.Function):
    """v_reset where s == 1, else h: a select, so that an infinite h is reset too."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, v_reset: float) -> Tensor:
        ctx.save_for_backward(h, s)
        ctx.v_reset = v_reset
        return torch.where(s == 1, v_reset, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_v: Tensor) -> Any:
        h, s = ctx.saved_tensors
        grad_s = (ctx.v_reset - h) * grad_v if ctx.needs_input_grad[1] else None
        return torch.where(s == 1, 0, grad_v), grad_s, None


def _check_values(threshold: Tensor, leak: Tensor) -> None:
    if not bool(((threshold > 0) & threshold.isfinite()).all()):
        raise ValueError(f"threshold: expected finite values > 0, got {threshold.tolist()}")
    if not bool(leak.isfinite().all()):
        raise ValueError(f"leak: expected finite values, got {leak.tolist()}")


def lif_forward(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    """x [T, *neurons] -> spikes s [T, *neurons] like x, last membrane v [*neurons] (or empty).

    threshold, leak: 1-D, one element or C elements that act along dim 2 of x; like v0 and v they
    are float32, or float64 when x is. Differentiable in x, threshold, leak and v0. Raises
    ValueError for a threshold <= 0 or a parameter that is not finite (not while torch.compile
    traces).
    """
    if not torch.compiler.is_compiling():
        _check_values(threshold, leak)
    channels = (-1, *[1] * (x.dim() - 3))
    threshold = threshold.reshape(channels if threshold.numel() > 1 else ())
    leak = leak.reshape(channels if leak.numel() > 1 else ())

    def spike(h: Tensor) -> Tensor:
        s: Tensor = _Spike.apply(h, threshold, surrogate, surrogate_scale)
        return s

    def held(s: Tensor) -> Tensor:
        return s.detach() if detach_reset else s

    acc = acc_dtype(x.dtype)
    v, s = v0, None
    if reset == "soft_delayed" and v0 is not None:
        s = spike(v0)
    spikes = []
    for x_t in x.unbind(0):
        h = x_t.to(acc) if v is None else leak * v + x_t.to(acc)
        if reset == "soft_delayed" and s is not None:
            h = h - threshold * held(s)
        s = spike(h)
        if reset == "soft":
            v = h - threshold * held(s)
        elif reset == "hard":
            v = _HardReset.apply(h, held(s), v_reset)
        else:
            v = h
        spikes.append(s.to(x.dtype))
    assert v is not None  # T >= 1
    # one timestep stays where it is, in the layout of x: what reads it next may be a convolution
    s = torch.stack(spikes) if len(spikes) > 1 else spikes[0].unsqueeze(0)
    return s, v if return_v else x.new_empty(0, dtype=acc)


def pack(s: Tensor) -> Tensor:
    """Spikes [T, *neurons], 0 or 1, in any dense layout -> bits uint8 [T, 8 * ceil(N / 64)].

    Bit j of byte k is neuron 8k + j in memory order; the tail is zero. Raises ValueError for NaN.
    """
    if not torch.compiler.is_compiling() and bool(s.isnan().any()):
        raise ValueError("packed: expected a current without NaN, got NaN (a bit cannot hold it)")
    order = sorted(range(1, s.dim()), key=lambda d: (s.stride(d), s.size(d)), reverse=True)
    flat = s.permute(0, *order).reshape(s.shape[0], -1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 64))
    weights = 1 << torch.arange(8, device=s.device, dtype=torch.int32)
    octets = flat.to(torch.int32).view(s.shape[0], flat.shape[1] // 8, 8)
    return (octets * weights).sum(-1).to(torch.uint8)


def product(sizes: Sequence[int]) -> int:
    """math.prod, which torch.compile does not trace on Python 3.13."""
    total = 1
    for size in sizes:
        total = total * size
    return total


def empty_spikes(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output [T, *neurons] for x: the memory order of x[0], timesteps one after the other."""
    stride = (product(x.shape[1:]), *x.stride()[1:])
    return x.new_empty_strided(x.shape, stride, dtype=dtype or x.dtype)


def lif_packed(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    """lif_forward without gradient, its spikes packed by `pack` in the memory order of x[0]."""
    with torch.no_grad():
        s, v = lif_forward(x, threshold, leak, v0, reset, v_reset, True, "triangle", 0.3, return_v)
    return pack(empty_spikes(x).copy_(s)), v


def unpack_spikes(bits: Tensor, size: list[int], stride: list[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`: spikes of `size`, `dtype` and the dense `stride` (time outermost)."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    neurons = product(size[1:])
    flat = ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :neurons]
    return flat.to(dtype).contiguous().as_strided(size, stride)
