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
import triton.language as tl
from torch import Tensor

from iirsnn.ops.reference import empty_spikes

from .launch import check_current, code, gradient_in_order, traced
from .lif import SEGMENT, advance, load_same, load_steps, segmented
from .step import (
    RESETS,
    SURROGATES,
    backward_step,
    charge,
    discharge,
    discharge_again,
    number,
)
from .tiles import COLUMN, columns, multiple, rows_of, tile

# Of x that a program asks for before it needs the first: with 4 warps, 16 bytes a thread are 2 KiB.
_LOADS_BYTES = 8192
_BLOCK_BYTES = 2048  # the least of a timestep
_PROGRAMS = 1024  # enough for every device of today; a constant, so that sums have the same bits
_FINISH = {"CHANNELS": 8, "SPLITS": 128}  # a tile of partial sums
_SIZES = [
    *("N", "x_stride_t", "grad_stride_t", "timesteps", "segments", "channels"),
    *("rows", "width", "row_stride", "plane_stride", "col_blocks", "groups", "tiles", "splits"),
]


@triton.jit
def channel_value(ptr, plane, cols, mask, INDEX: tl.constexpr, MANY: tl.constexpr = True):
    """Of a parameter [C], or [1] where not MANY: a scalar, or [1, COLS]."""
    if not MANY:
        value = tl.load(ptr)
    elif INDEX == COLUMN:
        value = tl.load(ptr + cols, mask=mask, other=1.0)
    else:
        value = tl.load(ptr + plane)
    return value


@triton.jit
def normalised(x, gain, shift):
    """What a BatchNorm of the dtype of x would write, in float32."""
    # see `charge`: the product is rounded on its own
    current = tl.fma(x.to(tl.float32), gain, 0.0) + shift
    return current.to(x.dtype).to(tl.float32)


@triton.jit
def normalised_steps(xs, gain, shift, STEPS: tl.constexpr):
    currents = ()
    for t in tl.static_range(STEPS):
        currents += (normalised(xs[t], gain, shift),)
    return currents


@triton.jit
def gain_and_shift(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, plane, cols, mask, INDEX: tl.constexpr
):
    mean = channel_value(mean_ptr, plane, cols, mask, INDEX)
    gain = channel_value(rstd_ptr, plane, cols, mask, INDEX)
    if weight_ptr is not None:
        gain = gain * channel_value(weight_ptr, plane, cols, mask, INDEX)
    bias = 0.0
    if bias_ptr is not None:
        bias = channel_value(bias_ptr, plane, cols, mask, INDEX)
    return mean, gain, bias - tl.fma(mean, gain, 0.0)


@triton.jit
def place(tile_number, group, col_blocks, INDEX: tl.constexpr):
    """-> plane, row block, column block of a tile of a group."""
    plane = group
    row_block = tile_number // col_blocks
    col_block = tile_number % col_blocks
    if INDEX == COLUMN:
        plane = 0
        row_block = tile_number
        col_block = group
    return plane, row_block, col_block


@triton.jit
def store_sum(
    ptr,
    total,
    split,
    value,
    plane,
    cols,
    channels,
    mask,
    VALUES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """total [ROWS, COLS] float32, summed per channel, into [splits, VALUES, C] float64."""
    slot = ptr + (tl.cast(split, tl.int64) * VALUES + value) * channels
    wide = total.to(tl.float64)
    if INDEX == COLUMN:
        tl.store(slot + cols, tl.sum(wide, 0, keep_dims=True), mask=mask)
    else:
        tl.store(slot + plane, tl.sum(wide))


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x_ptr,
    partial_ptr,  # [splits, 2, C] float64
    x_stride_t,
    timesteps,
    channels,
    rows,
    width,
    row_stride,
    plane_stride,
    col_blocks,
    groups,
    tiles,
    splits,
    INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups
    width = multiple(width, VEC)
    stride_t = multiple(x_stride_t, VEC)
    plane, row_block, col_block = place(first, group, col_blocks, INDEX)
    cols = columns(col_block, COLS)
    centre = channel_value(
        x_ptr, plane * multiple(plane_stride, VEC), cols, cols < width, INDEX
    ).to(tl.float32)
    centre = tl.where(centre - centre == 0.0, centre, 0.0)
    total = tl.zeros([ROWS, COLS], tl.float32)
    square = total
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        mask = (r < rows) & (cols < width)
        for t in range(timesteps):
            x = tl.load(x_ptr + tl.cast(t, tl.int64) * stride_t + n, mask=mask, other=0.0)
            apart = tl.where(mask, x.to(tl.float32) - centre, 0.0)
            total += apart
            square += apart * apart
    mask = cols < width
    store_sum(partial_ptr, total, first, 0, plane, cols, channels, mask, 2, INDEX)
    store_sum(partial_ptr, square, first, 1, plane, cols, channels, mask, 2, INDEX)


@triton.jit
def sum_partials(
    ptr,
    value,
    c,  # [CHANNELS]
    channels,
    splits,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """[splits, VALUES, C] -> the sum over splits of one value, for channels c"""
    total = tl.zeros([SPLITS, CHANNELS], tl.float64)
    for first in range(0, splits, SPLITS):
        k = (first + tl.arange(0, SPLITS))[:, None]
        slots = (tl.cast(k, tl.int64) * VALUES + value) * channels + c[None, :]
        total += tl.load(ptr + slots, mask=(k < splits) & (c[None, :] < channels), other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["inner_stride", "channels", "splits", "count", "repeated"])
def finish_moments_kernel(
    x_ptr,
    partial_ptr,
    sums_ptr,  # [2, C] float64
    mean_ptr,
    var_ptr,
    rstd_ptr,
    inner_stride,  # from one channel of x to the next
    channels,
    splits,
    count,  # of the values of a channel that were read
    repeated,  # how often x has each of them
    eps,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    n = tl.cast(count, tl.float64)
    total = sum_partials(partial_ptr, 0, c, channels, splits, 2, CHANNELS, SPLITS)
    square = sum_partials(partial_ptr, 1, c, channels, splits, 2, CHANNELS, SPLITS)
    centre = tl.load(x_ptr + c * tl.cast(inner_stride, tl.int64), mask=mask, other=0.0)
    centre = centre.to(tl.float32)
    centre = tl.where(centre - centre == 0.0, centre, 0.0).to(tl.float64)
    offset = total / n
    spread = square / n - offset * offset
    variance = tl.where(spread < 0.0, 0.0, spread)  # below 0 by rounding; NaN stays
    rstd = 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float64))
    tl.store(mean_ptr + c, (centre + offset).to(tl.float32), mask=mask)
    tl.store(var_ptr + c, variance.to(tl.float32), mask=mask)
    tl.store(rstd_ptr + c, rstd.to(tl.float32), mask=mask)
    tl.store(sums_ptr + c, (total + n * centre) * repeated, mask=mask)
    squares = square + 2.0 * centre * total + n * centre * centre
    tl.store(sums_ptr + channels + c, squares * repeated, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def fire_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    threshold_ptr,
    leak_ptr,
    s_ptr,
    N,
    x_stride_t,
    segments,
    rows,
    width,
    row_stride,
    plane_stride,
    col_blocks,
    groups,
    tiles,
    splits,
    v_reset,
    RESET: tl.constexpr,
    FIRST: tl.constexpr,
    LONG: tl.constexpr,
    X_MOVES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEAKS: tl.constexpr,
    INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups
    v_reset = number(v_reset)
    N = multiple(N, VEC)
    width = multiple(width, VEC)
    stride_t = multiple(x_stride_t, VEC)
    plane, row_block, col_block = place(first, group, col_blocks, INDEX)
    cols = columns(col_block, COLS)
    inside = cols < width
    _mean, gain, shift = gain_and_shift(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, plane, cols, inside, INDEX
    )
    threshold = channel_value(threshold_ptr, plane, cols, inside, INDEX, THRESHOLDS)
    leak = channel_value(leak_ptr, plane, cols, inside, INDEX, LEAKS)
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        mask = (r < rows) & (cols < width)
        x_ptrs, s_ptrs = x_ptr + n, s_ptr + n
        same = load_same(x_ptrs, mask, X_MOVES)
        xs = load_steps(x_ptrs, stride_t, mask, same, FIRST)
        currents = normalised_steps(xs, gain, shift, FIRST)
        v = advance(None, currents, s_ptrs, N, mask, threshold, leak, v_reset, RESET, FIRST)
        if LONG:
            for k in range(segments):
                t = FIRST + SEGMENT * tl.cast(k, tl.int64)
                xs_k = load_steps(x_ptrs + t * stride_t, stride_t, mask, same, SEGMENT)
                currents_k = normalised_steps(xs_k, gain, shift, SEGMENT)
                s_k = s_ptrs + t * N
                v = advance(v, currents_k, s_k, N, mask, threshold, leak, v_reset, RESET, SEGMENT)


@triton.jit
def unwind(
    sum_threshold,
    sum_leak,
    sum_grad,  # the gradient of the current
    sum_dot,  # that times x - mean
    g_v,  # gradient of the membrane after the segment
    g_h,  # gradient of h one timestep after the segment
    v,  # the membrane before the segment, None before the first timestep
    xs,
    gs,
    grad_x_ptrs,  # or None: sums
    N,
    mask,
    mean,
    gain,
    shift,
    grad_mean,
    slope,
    threshold,
    leak,
    inverse,  # 1 / threshold
    v_reset,
    scale,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS timesteps forward for h, then backward -> sums, g_v, g_h"""
    hs = ()
    v_t = v
    for t in tl.static_range(STEPS):
        hs += (charge(v_t, normalised(xs[t], gain, shift), threshold, leak, RESET),)
        v_t = discharge(hs[t], threshold, v_reset, RESET)
    for t in tl.static_range(STEPS - 1, -1, -1):
        before = v
        if t > 0:
            before = discharge_again(hs[t - 1], threshold, v_reset, RESET)
        g_h, g_v, g_threshold = backward_step(
            gs[t].to(tl.float32),
            hs[t],
            before,
            g_v,
            g_h,
            threshold,
            leak,
            inverse,
            v_reset,
            scale,
            RESET,
            DETACH,
            SURROGATE,
        )
        centred = xs[t].to(tl.float32) - mean
        if grad_x_ptrs is not None:
            grad_x = (g_h - grad_mean - centred * slope) * gain
            tl.store(grad_x_ptrs + t * N, grad_x.to(grad_x_ptrs.dtype.element_ty), mask=mask)
        else:
            sum_threshold += g_threshold
            if before is not None:
                sum_leak += g_h * before
            sum_grad += g_h
            sum_dot += g_h * centred
    return sum_threshold, sum_leak, sum_grad, sum_dot, g_v, g_h


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad_s_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    threshold_ptr,
    leak_ptr,
    grad_mean_ptr,  # None for the pass over the sums
    slope_ptr,
    grad_x_ptr,
    partial_ptr,  # [splits, 4, C] float64, None for the pass over grad_x
    membrane_ptr,  # [segments, N], None if not LONG; the pass over the sums writes them
    N,
    x_stride_t,
    grad_stride_t,
    segments,
    channels,
    rows,
    width,
    row_stride,
    plane_stride,
    col_blocks,
    groups,
    tiles,
    splits,
    v_reset,
    scale,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    FIRST: tl.constexpr,
    LONG: tl.constexpr,
    X_MOVES: tl.constexpr,
    G_MOVES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEAKS: tl.constexpr,
    INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups
    v_reset, scale = number(v_reset), number(scale)
    N = multiple(N, VEC)
    width = multiple(width, VEC)
    x_stride = multiple(x_stride_t, VEC)
    g_stride = multiple(grad_stride_t, VEC)
    plane, row_block, col_block = place(first, group, col_blocks, INDEX)
    cols = columns(col_block, COLS)
    inside = cols < width
    mean, gain, shift = gain_and_shift(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, plane, cols, inside, INDEX
    )
    threshold = channel_value(threshold_ptr, plane, cols, inside, INDEX, THRESHOLDS)
    leak = channel_value(leak_ptr, plane, cols, inside, INDEX, LEAKS)
    grad_mean = 0.0
    slope = 0.0
    if grad_mean_ptr is not None:
        grad_mean = channel_value(grad_mean_ptr, plane, cols, inside, INDEX)
        slope = channel_value(slope_ptr, plane, cols, inside, INDEX)
    inverse = 1.0 / threshold
    zero = tl.zeros([ROWS, COLS], tl.float32)
    sum_threshold = zero
    sum_leak = zero
    sum_grad = zero
    sum_dot = zero
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        mask = (r < rows) & (cols < width)
        x_ptrs, g_ptrs = x_ptr + n, grad_s_ptr + n
        same_x, same_g = load_same(x_ptrs, mask, X_MOVES), load_same(g_ptrs, mask, G_MOVES)
        g_v, g_h = zero, zero
        grad_x_ptrs = None
        if grad_mean_ptr is not None:
            grad_x_ptrs = grad_x_ptr + n
        if LONG:
            if grad_mean_ptr is None:
                xs_0 = load_steps(x_ptrs, x_stride, mask, same_x, FIRST)
                currents_0 = normalised_steps(xs_0, gain, shift, FIRST)
                v = advance(None, currents_0, None, N, mask, threshold, leak, v_reset, RESET, FIRST)
                tl.store(membrane_ptr + n, v, mask=mask)
                for j in range(1, segments):
                    t = FIRST + SEGMENT * tl.cast(j - 1, tl.int64)
                    xs_j = load_steps(x_ptrs + t * x_stride, x_stride, mask, same_x, SEGMENT)
                    currents_j = normalised_steps(xs_j, gain, shift, SEGMENT)
                    v = advance(
                        v, currents_j, None, N, mask, threshold, leak, v_reset, RESET, SEGMENT
                    )
                    tl.store(membrane_ptr + j * N + n, v, mask=mask)
                tl.debug_barrier()  # a membrane may come back to another thread than wrote it
            for i in range(segments):
                k = tl.cast(segments - 1 - i, tl.int64)
                t = FIRST + SEGMENT * k
                grad_x_k = None
                if grad_mean_ptr is not None:
                    grad_x_k = grad_x_ptr + n + t * N
                sum_threshold, sum_leak, sum_grad, sum_dot, g_v, g_h = unwind(
                    sum_threshold,
                    sum_leak,
                    sum_grad,
                    sum_dot,
                    g_v,
                    g_h,
                    tl.load(membrane_ptr + k * N + n, mask=mask, other=0.0),
                    load_steps(x_ptrs + t * x_stride, x_stride, mask, same_x, SEGMENT),
                    load_steps(g_ptrs + t * g_stride, g_stride, mask, same_g, SEGMENT),
                    grad_x_k,
                    N,
                    mask,
                    mean,
                    gain,
                    shift,
                    grad_mean,
                    slope,
                    threshold,
                    leak,
                    inverse,
                    v_reset,
                    scale,
                    RESET,
                    DETACH,
                    SURROGATE,
                    SEGMENT,
                )
        sum_threshold, sum_leak, sum_grad, sum_dot, g_v, g_h = unwind(
            sum_threshold,
            sum_leak,
            sum_grad,
            sum_dot,
            g_v,
            g_h,
            None,
            load_steps(x_ptrs, x_stride, mask, same_x, FIRST),
            load_steps(g_ptrs, g_stride, mask, same_g, FIRST),
            grad_x_ptrs,
            N,
            mask,
            mean,
            gain,
            shift,
            grad_mean,
            slope,
            threshold,
            leak,
            inverse,
            v_reset,
            scale,
            RESET,
            DETACH,
            SURROGATE,
            FIRST,
        )
    if partial_ptr is not None:
        inside = cols < width
        sums = (sum_threshold, sum_leak, sum_grad, sum_dot)
        for value in tl.static_range(4):
            store_sum(
                partial_ptr, sums[value], first, value, plane, cols, channels, inside, 4, INDEX
            )


@triton.jit(do_not_specialize=["channels", "splits", "count"])
def finish_sums_kernel(
    partial_ptr,
    rstd_ptr,
    sums_ptr,  # [4, C] float64
    grad_weight_ptr,  # [C] each
    grad_bias_ptr,
    grad_mean_ptr,
    slope_ptr,
    channels,
    splits,
    count,  # of the values of a channel
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    n = tl.cast(count, tl.float64)
    rstd = tl.load(rstd_ptr + c, mask=mask, other=0.0).to(tl.float64)
    for value in tl.static_range(4):
        total = sum_partials(partial_ptr, value, c, channels, splits, 4, CHANNELS, SPLITS)
        tl.store(sums_ptr + value * channels + c, total, mask=mask)
        if value == 2:
            tl.store(grad_bias_ptr + c, total.to(tl.float32), mask=mask)
            tl.store(grad_mean_ptr + c, (total / n).to(tl.float32), mask=mask)
        if value == 3:
            tl.store(grad_weight_ptr + c, (total * rstd).to(tl.float32), mask=mask)
            tl.store(slope_ptr + c, (total / n * rstd * rstd).to(tl.float32), mask=mask)


# ---- launchers


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
