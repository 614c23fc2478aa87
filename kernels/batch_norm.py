"""BatchNorm, with the statistics of its input, and LIF in one.

Two launches forward and two backward. Bytes of global memory per neuron and timestep, b = bytes of
one element of x:
  moments    reads b
  fire       reads b, writes b
  sums       reads 2 b (x and grad_s)
  grad_x     reads 2 b, writes b
  T > 8      sums reads (1 - 8 / T) b of x again; both move 4 per neuron and segment but the first
An input or gradient that is the same at every timestep (stride 0) is read once a segment.

The normalised current is computed in registers, from x, whenever it is needed, and rounded to the
dtype of x, as it would be if it were written. Programs of a group of channels share its tiles;
sums are float32 in a thread and float64 over threads and programs, in a fixed order (sums.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bn_lif import backward_kernel, fire_kernel
from .launch import (
    Launch,
    Launcher,
    check_current,
    code,
    empty_gradient,
    is_in_order,
    now,
    planned,
    planned_in_order,
    processors,
)
from .lif import segmented
from .moments import moments_kernel, totals_kernel
from .step import RESETS, SURROGATES
from .sums import workspace_of
from .tiles import AT_ONCE, tile

# Of x that a program asks for before it needs the first: with 4 warps, 16 bytes a thread are 2 KiB.
_LOADS_BYTES = 8192
_BLOCK_BYTES = 2048  # the least of a timestep
_FIRING = 1024  # programs that hand over no sums: enough for every device of today
_CHANNELS = 128  # of the sums of several processes


class Plan(NamedTuple):
    """How the tiles of a timestep are shared out to programs."""

    programs: int
    #: Programs that share the tiles of a group, a plane or a block of columns; channels; groups.
    shared: tuple[int, int, int]
    strides: tuple[int, ...]  # of spikes, or of grad_x
    arguments: dict[str, int]


def plan(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    programs: int,
    together: int,
    *between: int,
) -> Plan:
    """programs: at most; together: the loads of one position that a program has in flight, a power
    of two; between: the strides over timesteps of what it loads.
    """
    block = max(_BLOCK_BYTES, _LOADS_BYTES // together)
    tiling = tile(shape, strides, shape[2], block // dtype.itemsize, programs)
    arguments = {
        **tiling.arguments,
        **tiling.summing,
        "x_stride_t": strides[0],
        "channels": shape[2],
        "INDEX": tiling.index,
        "VEC": tiling.vector(dtype, *between),
    }
    strides_of_all = (tiling.N, *strides[1:])
    return Plan(tiling.groups * tiling.splits, tiling.shared, strides_of_all, arguments)


def _together(timesteps: int) -> int:
    return 1 if timesteps == 1 else 2 if timesteps == 2 else 4


def check_input(x: Tensor) -> None:
    """x [T, B, C, ...] without a 0 in a dtype of DTYPES: else TypeError or ValueError."""
    check_current(x)
    if x.dim() < 3 or x.numel() == 0:
        raise ValueError(f"x: expected shape [T, B, C, ...] without a 0, got {tuple(x.shape)}")


@planned
def _plan_moments(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, processors: int
) -> tuple[Launch, tuple[int, int, int]]:
    """A launch, and what its programs share."""
    p = plan(shape, strides, dtype, AT_ONCE * processors, 1, strides[0])
    timesteps = shape[0] if strides[0] != 0 else 1
    arguments = {
        **p.arguments,
        "timesteps": timesteps,
        "count": timesteps * (math.prod(shape) // shape[0] // shape[2]),
        "repeated": shape[0] // timesteps,
    }
    return Launch(moments_kernel, p.programs, arguments), p.shared


class Running(NamedTuple):
    """What a norm keeps of its calls, which one more is counted in; momentum NaN: a mean of all."""

    mean: Tensor | None  # float32 [C] each
    var: Tensor | None  # unbiased
    calls: Tensor | None  # int64, one
    momentum: float


NOTHING = Running(None, None, None, 0.0)


def statistics(
    x: Tensor,
    eps: float,
    launch: Launcher = now,
    running: Running = NOTHING,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, B, C, ...] -> mean, var, rstd float32 [C]. Fills sums, float64 [2, C]: of x, of x^2."""
    check_input(x)
    over_tiles, shared = _plan_moments(x.shape, x.stride(), x.dtype, processors(x.device))
    workspace = workspace_of(x, *shared, 2, launch, running.calls is not None)
    mean, var, rstd = (x.new_empty(x.shape[2], dtype=torch.float32) for _ in range(3))
    tensors = x, *workspace, sums, mean, var, rstd, *running[:3]
    launch(over_tiles, tensors, eps, running.momentum)
    return mean, var, rstd


def moments(x: Tensor, eps: float, launch: Launcher = now) -> tuple[Tensor, ...]:
    """x [T, B, C, ...] -> sums float64 [2, C] of x, of its square; mean, var, rstd float32 [C]."""
    check_input(x)
    sums = x.new_empty(2, x.shape[2], dtype=torch.float64)
    return sums, *statistics(x, eps, launch, sums=sums)


@planned
def _plan_totals(channels: int) -> Launch:
    return Launch(totals_kernel, 1, {"channels": channels, "CHANNELS": _CHANNELS})


def totals(total: Tensor, eps: float, running: Running) -> tuple[Tensor, Tensor]:
    """total float64 [3, C]: sums of x and of its square, and how many they are of -> mean, rstd."""
    mean, rstd = (total.new_empty(total.shape[1], dtype=torch.float32) for _ in range(2))
    written = mean, rstd, *running[:3]
    now(_plan_totals(total.shape[1]), (total, *written), eps, running.momentum)
    return mean, rstd


@planned
def _plan_fire(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    thresholds: int,
    leaks: int,
    reset: str,
) -> tuple[Launch, tuple[int, ...]]:
    """A launch, and the strides of the spikes."""
    p = plan(shape, strides, dtype, _FIRING, _together(shape[0]), strides[0])
    first, segments = segmented(shape[0])
    arguments = {
        **p.arguments,
        "N": math.prod(shape) // shape[0],
        "segments": segments,
        "RESET": code(RESETS, "reset", reset),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "THRESHOLDS": thresholds > 1,
        "LEAKS": leaks > 1,
    }
    return Launch(fire_kernel, p.programs, arguments), p.strides


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
    launch: Launcher = now,
) -> Tensor:
    """x [T, B, C, ...] -> s like x; mean, rstd, weight, bias [C]; threshold, leak [1] or [C]."""
    check_input(x)
    how = x.dtype, threshold.numel(), leak.numel(), reset
    over_tiles, strides = _plan_fire(x.shape, x.stride(), *how)
    s = x.new_empty_strided(x.shape, strides)
    launch(over_tiles, (x, mean, rstd, weight, bias, threshold, leak, s), v_reset)
    return s


class BackwardPlan(NamedTuple):
    """The launch of either pass, what its programs share, strides of grad_x, later segments."""

    over_tiles: Launch
    shared: tuple[int, int, int]
    strides: tuple[int, ...]
    segments: int


@planned
def _plan_backward(
    shape: torch.Size,
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    dtype: torch.dtype,
    processors: int,
    thresholds: int,
    leaks: int,
    reset: str,
    detach_reset: bool,
    surrogate: str,
) -> BackwardPlan | None:
    """None where grad_s is in another order than x."""
    if not is_in_order(grad_strides, strides, shape):
        return None
    together = 2 * _together(shape[0])
    # of so many registers that a multiprocessor holds three
    programs = (AT_ONCE if together < 8 else 3) * processors
    p = plan(shape, strides, dtype, programs, together, strides[0], grad_strides[0])
    first, segments = segmented(shape[0])
    arguments = {
        **p.arguments,
        "N": math.prod(shape) // shape[0],
        "grad_stride_t": grad_strides[0],
        "segments": segments,
        "RESET": code(RESETS, "reset", reset),
        "DETACH": detach_reset,
        "SURROGATE": code(SURROGATES, "surrogate", surrogate),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "G_MOVES": grad_strides[0] != 0,
        "THRESHOLDS": thresholds > 1,
        "LEAKS": leaks > 1,
        "count": math.prod(shape) // shape[2],
    }
    launch = Launch(backward_kernel, p.programs, arguments)
    return BackwardPlan(launch, p.shared, p.strides, segments)


Parameters = Sequence[Tensor | None]  # mean, rstd, weight, bias, threshold, leak
Options = tuple[str, float, bool, str, float]  # of the op


def _planned_backward(
    grad_s: Tensor, x: Tensor, parameters: Parameters, how: Options
) -> tuple[Tensor, BackwardPlan]:
    """grad_s in the order of x, and the plan."""
    reset, _, detach_reset, surrogate, _ = how
    *_, threshold, leak = parameters
    assert threshold is not None
    assert leak is not None
    how_many = threshold.numel(), leak.numel()
    return planned_in_order(_plan_backward, grad_s, x, *how_many, reset, detach_reset, surrogate)


class Sums(NamedTuple):
    """What the first pass backward leaves."""

    grad_x: Tensor  # empty
    sums: Tensor  # [4, C]
    workspace: Tensor
    grad_mean: Tensor  # [C] each
    slope: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_threshold: Tensor | None  # None where not learned
    grad_leak: Tensor | None


def gradient_sums(
    grad_s: Tensor,
    x: Tensor,
    parameters: Parameters,
    how: Options,
    learned: bool,
    launch: Launcher = now,
) -> Sums:
    """parameters: mean, rstd, weight, bias, threshold, leak; how: the options of the op.

    learned: whether threshold and leak are.
    """
    check_input(x)
    grad_s, p = _planned_backward(grad_s, x, parameters, how)
    channels = x.shape[2]
    workspace = x.new_empty(p.segments, x.numel() // x.shape[0], dtype=torch.float32)
    sums = x.new_empty(4, channels, dtype=torch.float64)
    found = [x.new_empty(channels, dtype=torch.float32) for _ in range(4)]
    of_neuron: list[Tensor | None] = [None, None]
    if learned:
        of_neuron = [t.new_empty(t.shape) for t in parameters[4:] if t is not None]
    rows_and_counters = workspace_of(x, *p.shared, 4, launch, learned)
    kept = workspace if p.segments else None
    written = *found[:2], kept, None, *rows_and_counters, sums, *found[2:], *of_neuron
    launch(p.over_tiles, (grad_s, x, *parameters, *written), how[1], how[4])
    grad_x = empty_gradient(x, x.shape, p.strides)
    return Sums(grad_x, sums, workspace, *found, *of_neuron)


def finish_grad_x(
    grad_x: Tensor,
    workspace: Tensor,
    grad_mean: Tensor,
    slope: Tensor,
    grad_s: Tensor,
    x: Tensor,
    parameters: Parameters,
    how: Options,
    launch: Launcher = now,
) -> None:
    """Fill grad_x, after `gradient_sums` with the same arguments."""
    grad_s, p = _planned_backward(grad_s, x, parameters, how)
    second = grad_mean, slope, workspace if p.segments else None, grad_x
    tensors = grad_s, x, *parameters, *second, *[None] * 7
    launch(p.over_tiles, tensors, how[1], how[4])
