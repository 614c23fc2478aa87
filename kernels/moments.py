"""BatchNorm's statistics in one launch: sums over tiles, then mean, variance and 1 / deviation.

The running statistics are written with them, with the bits of torch's ops.

Statistics are those of x - centre, centre the channel's first value, so that a variance far below
the mean is as exact as one at 0.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .normalised import channel_value
from .sums import all_brought, channels_of, is_last, over_neurons, over_programs, store_row
from .tiles import SIZES, columns, multiple, place, rows_of

# The interpreter rounds a fused multiply-add twice.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def towards(old, new, weight):
    """torch.lerp"""
    little = tl.abs(weight) < 0.5
    part, start = tl.where(little, weight, weight - 1.0), tl.where(little, old, new)
    if INTERPRETED:
        product = part.to(tl.float64) * (new - old).to(tl.float64)
        result = (product + start.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(part, new - old, start)
    return result


@triton.jit
def update(mean_ptr, var_ptr, calls, momentum, c, mask, mean, unbiased):
    """Running statistics of channels c, from those of a call, float32; calls: with this one.

    momentum: NaN where they are means over all calls.
    """
    momentum = tl.cast(momentum, tl.float32)
    share = (1.0 / calls.to(tl.float64)).to(tl.float32)
    weight = tl.where(momentum == momentum, momentum, share)
    old_mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    old_var = tl.load(var_ptr + c, mask=mask, other=0.0)
    tl.store(mean_ptr + c, towards(old_mean, mean, weight), mask=mask)
    tl.store(var_ptr + c, towards(old_var, unbiased, weight), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr,
    partial_ptr,  # see all_brought
    counters_ptr,
    sums_ptr,  # [2, C] float64, or None
    mean_ptr,
    var_ptr,
    rstd_ptr,
    running_mean_ptr,  # [C], or None: not updated
    running_var_ptr,
    calls_ptr,  # int64 [1], without this one
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
    count,  # of the values of a channel that are read
    repeated,  # how often x has each of them
    eps,
    momentum,
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
    apart_sum = tl.zeros([ROWS, COLS], tl.float32)
    square_sum = apart_sum
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        mask = (r < rows) & (cols < width)
        for t in range(timesteps):
            x = tl.load(x_ptr + tl.cast(t, tl.int64) * stride_t + n, mask=mask, other=0.0)
            apart = tl.where(mask, x.to(tl.float32) - centre, 0.0)
            apart_sum += apart
            square_sum += apart * apart
    c = channels_of(plane, cols, INDEX)
    sums = (
        over_neurons(apart_sum.to(tl.float64), INDEX),
        over_neurons(square_sum.to(tl.float64), INDEX),
    )
    if all_brought(sums, partial_ptr, counters_ptr, c, channels, first, splits, group, 2):
        n = tl.cast(count, tl.float64)
        total = over_programs(sums, 0, partial_ptr, c, channels, splits)
        square = over_programs(sums, 1, partial_ptr, c, channels, splits)
        start = centre.to(tl.float64)
        offset = total / n
        spread = square / n - offset * offset
        variance = tl.where(spread < 0.0, 0.0, spread)  # below 0 by rounding; NaN stays
        mean = (start + offset).to(tl.float32)
        store_row(mean_ptr, mean, c, channels)
        store_row(var_ptr, variance, c, channels)
        store_row(rstd_ptr, 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float64)), c, channels)
        if sums_ptr is not None:
            squares = square + 2.0 * start * total + n * start * start
            store_row(sums_ptr, (total + n * start) * repeated, c, channels)
            store_row(sums_ptr + channels, squares * repeated, c, channels)
        if running_mean_ptr is not None:
            values = n * repeated
            more = (values / (values - 1.0)).to(tl.float32)
            unbiased = tl.fma(variance.to(tl.float32), more, 0.0)
            calls = tl.load(calls_ptr) + 1
            inside = c < channels
            update(running_mean_ptr, running_var_ptr, calls, momentum, c, inside, mean, unbiased)
            if is_last(counters_ptr, groups):  # all have read it
                tl.store(calls_ptr, calls)


@triton.jit(do_not_specialize=["channels"])
def totals_kernel(
    totals_ptr,  # [3, C] float64: sums of x and of its square, and how many they are of
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    calls_ptr,
    channels,
    eps,
    momentum,
    CHANNELS: tl.constexpr,
):
    """One program, which counts the call after it has read how many there were."""
    calls = tl.load(calls_ptr) + 1
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        mask = c < channels
        n = tl.load(totals_ptr + 2 * channels + c, mask=mask, other=2.0)
        mean = tl.load(totals_ptr + c, mask=mask, other=0.0) / n
        square = tl.load(totals_ptr + channels + c, mask=mask, other=0.0) / n
        spread = square - tl.fma(mean, mean, 0.0)
        variance = tl.where(spread < 0.0, 0.0, spread)
        rstd = 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float64))
        tl.store(mean_ptr + c, mean.to(tl.float32), mask=mask)
        tl.store(rstd_ptr + c, rstd.to(tl.float32), mask=mask)
        unbiased = (variance * (n / (n - 1.0))).to(tl.float32)
        wide = mean.to(tl.float32)
        update(running_mean_ptr, running_var_ptr, calls, momentum, c, mask, wide, unbiased)
    tl.debug_barrier()  # all threads have read it
    tl.store(calls_ptr, calls)
