"""BatchNorm, with the statistics of its input, and LIF in one.

Bytes of global memory per neuron and timestep, b = bytes of one element of x:
  moments    reads b
  fire       reads b, writes b
  sums       reads 2 b (x and grad_s)
  grad_x     reads 2 b, writes b
  T > 8      sums reads (1 - 8 / T) b of x again; both move 4 per neuron and segment but the first
An input or gradient that is the same at every timestep (stride 0) is read once a segment.

The normalised current is computed in registers, from x, whenever it is needed, and rounded to the
dtype of x, as it would be if it were written. Programs of a group of channels share its tiles;
partial sums are float32 in a program and float64 over programs, in a fixed order. Statistics are
those of x - centre, centre the channel's first value, so that a variance far below the mean is as
exact as one at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from iirsnn.ops.reference import empty_spikes

from .bn_lif import backward_kernel, finish_sums_kernel, fire_kernel
from .launch import check_current, code, gradient_in_order, traced
from .lif import segmented
from .moments import finish_moments_kernel, moments_kernel
from .step import RESETS, SURROGATES
from .tiles import COLUMN, tile

# Of x that a program asks for before it needs the first: with 4 warps, 16 bytes a thread are 2 KiB.
_LOADS_BYTES = 8192
_BLOCK_BYTES = 2048  # the least of a timestep
_PROGRAMS = 1024  # enough for every device of today; a constant, so that sums have the same bits
_FINISH = {"CHANNELS": 8, "SPLITS": 128}  # a tile of partial sums


class Plan(NamedTuple):
    """How the tiles of a timestep are shared out to programs."""

    groups: int  # of channels: a plane each, or a block of columns each
    tiles: int  # of a group
    splits: int  # programs that share them
    arguments: dict[str, int]

    @property
    def programs(self) -> int:
        return self.groups * self.splits


def plan(x: Tensor, together: int, *strides: int) -> Plan:
    """together: the loads of one position that a program has in flight, a power of two."""
    block = max(_BLOCK_BYTES, _LOADS_BYTES // together)
    tiling = tile(x, x.shape[2], block // x.element_size())
    columns_each = tiling.index == COLUMN.value
    groups = tiling.col_blocks if columns_each else tiling.planes
    tiles = tiling.row_blocks if columns_each else tiling.row_blocks * tiling.col_blocks
    splits = torch.sym_min(tiles, max(1, _PROGRAMS // groups))
    arguments = {
        **tiling.arguments,
        "groups": groups,
        "tiles": tiles,
        "splits": splits,
        "INDEX": tiling.index,
        "VEC": tiling.vector(x, *strides),
    }
    return Plan(groups, tiles, splits, arguments)


def _together(x: Tensor) -> int:
    return 1 if x.shape[0] == 1 else 2 if x.shape[0] == 2 else 4


def check_input(x: Tensor) -> None:
    """x [T, B, C, ...] without a 0 in a dtype of DTYPES: else TypeError or ValueError."""
    check_current(x)
    if x.dim() < 3 or x.numel() == 0:
        raise ValueError(f"x: expected shape [T, B, C, ...] without a 0, got {tuple(x.shape)}")


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, B, C, ...] -> sums float64 [2, C] of x and its square; mean, var, rstd float32 [C]."""
    check_input(x)
    p, channels = plan(x, 1, x.stride(0)), x.shape[2]
    timesteps = x.shape[0] if x.stride(0) != 0 else 1
    partial = x.new_empty(p.splits, 2, channels, dtype=torch.float64)
    traced(moments_kernel)[(p.programs,)](
        x, partial, x_stride_t=x.stride(0), timesteps=timesteps, channels=channels, **p.arguments
    )
    sums = x.new_empty(2, channels, dtype=torch.float64)
    mean, var, rstd = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    traced(finish_moments_kernel)[(triton.cdiv(channels, _FINISH["CHANNELS"]),)](
        x,
        partial,
        sums,
        mean,
        var,
        rstd,
        inner_stride=x.stride(2),
        channels=channels,
        splits=p.splits,
        count=timesteps * (x.numel() // x.shape[0] // channels),
        repeated=x.shape[0] // timesteps,
        eps=eps,
        **_FINISH,
    )
    return sums, mean, var, rstd


def fire(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
) -> Tensor:
    """x [T, B, C, ...] -> s like x; mean, rstd, weight, bias [C]; threshold, leak [1] or [C]."""
    check_input(x)
    s, p = empty_spikes(x), plan(x, _together(x), x.stride(0))
    first, segments = segmented(x.shape[0])
    traced(fire_kernel)[(p.programs,)](
        x,
        mean,
        rstd,
        weight,
        bias,
        threshold,
        leak,
        s,
        N=x.numel() // x.shape[0],
        x_stride_t=x.stride(0),
        segments=segments,
        v_reset=v_reset,
        RESET=code(RESETS, "reset", reset),
        FIRST=first,
        LONG=segments > 0,
        X_MOVES=x.stride(0) != 0,
        THRESHOLDS=threshold.numel() > 1,
        LEAKS=leak.numel() > 1,
        **p.arguments,
    )
    return s


def _backward(
    statistics: Sequence[Tensor | None],  # those of the second pass, else None
    grad_x: Tensor,
    partial: Tensor | None,
    workspace: Tensor,
    grad_s: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    p: Plan,
    how: tuple[str, float, bool, str, float],
) -> None:
    reset, v_reset, detach_reset, surrogate, scale = how
    threshold, leak = parameters[-2:]
    assert threshold is not None
    assert leak is not None
    first, segments = segmented(x.shape[0])
    traced(backward_kernel)[(p.programs,)](
        grad_s,
        x,
        *parameters,
        *statistics,
        grad_x,
        partial,
        workspace if segments else None,
        N=x.numel() // x.shape[0],
        x_stride_t=x.stride(0),
        grad_stride_t=grad_s.stride(0),
        segments=segments,
        channels=x.shape[2],
        v_reset=v_reset,
        scale=scale,
        RESET=code(RESETS, "reset", reset),
        DETACH=detach_reset,
        SURROGATE=code(SURROGATES, "surrogate", surrogate),
        FIRST=first,
        LONG=segments > 0,
        X_MOVES=x.stride(0) != 0,
        G_MOVES=grad_s.stride(0) != 0,
        THRESHOLDS=threshold.numel() > 1,
        LEAKS=leak.numel() > 1,
        **p.arguments,
    )


class Sums(NamedTuple):
    """What the first pass backward leaves."""

    grad_x: Tensor  # empty
    sums: Tensor  # [4, C]
    workspace: Tensor
    grad_weight: Tensor  # [C] each
    grad_bias: Tensor
    grad_mean: Tensor
    slope: Tensor


def gradient_sums(
    grad_s: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    how: tuple[str, float, bool, str, float],
) -> Sums:
    """parameters: mean, rstd, weight, bias, threshold, leak; how: the options of the op."""
    check_input(x)
    channels, neurons = x.shape[2], x.numel() // x.shape[0]
    grad_s = gradient_in_order(grad_s, x)
    p = plan(x, 2 * _together(x), x.stride(0), grad_s.stride(0))
    segments = segmented(x.shape[0])[1]
    partial = x.new_empty(p.splits, 4, channels, dtype=torch.float64)
    workspace = x.new_empty(segments, neurons, dtype=torch.float32)
    grad_x = empty_spikes(x)
    _backward((None, None), grad_x, partial, workspace, grad_s, x, parameters, p, how)
    sums = x.new_empty(4, channels, dtype=torch.float64)
    found = [x.new_empty(channels, dtype=torch.float32) for _ in range(4)]
    traced(finish_sums_kernel)[(triton.cdiv(channels, _FINISH["CHANNELS"]),)](
        partial,
        parameters[1],
        sums,
        *found,
        channels=channels,
        splits=p.splits,
        count=x.numel() // channels,
        **_FINISH,
    )
    return Sums(grad_x, sums, workspace, *found)


def finish_grad_x(
    grad_x: Tensor,
    workspace: Tensor,
    grad_mean: Tensor,
    slope: Tensor,
    grad_s: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    how: tuple[str, float, bool, str, float],
) -> None:
    """Fill grad_x, after `gradient_sums` with the same arguments."""
    grad_s = gradient_in_order(grad_s, x)
    p = plan(x, 2 * _together(x), x.stride(0), grad_s.stride(0))
    _backward((grad_mean, slope), grad_x, None, workspace, grad_s, x, parameters, p, how)


def gradient_of(total: Tensor, parameter: Tensor) -> Tensor:
    """total float64 [C] -> the gradient of threshold or leak, which may act on every channel."""
    return (total if parameter.numel() > 1 else total.sum(0, True)).float()
