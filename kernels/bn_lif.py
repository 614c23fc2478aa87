"""Kernels of BatchNorm and LIF in one: spikes, the sums of gradients, and the gradient of x.

The normalised current is computed in registers, from x, whenever it is needed, and rounded to the
dtype of x, as it would be if it were written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lif import SEGMENT, advance, load_same, load_steps
from .normalised import (
    channel_value,
    gain_and_shift,
    normalised,
    normalised_steps,
)
from .step import backward_step, charge, discharge, discharge_again, number
from .sums import (
    all_brought,
    channels_of,
    is_last,
    over_neurons,
    over_programs,
    store_over_channels,
    store_row,
)
from .tiles import SIZES, columns, multiple, place, rows_of


@triton.jit(do_not_specialize=SIZES)
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


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_s_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    threshold_ptr,
    leak_ptr,
    grad_mean_ptr,  # [C] each: the pass over the sums writes them, that over grad_x reads them
    slope_ptr,
    membrane_ptr,  # [segments, N], None if not LONG; the pass over the sums writes them
    grad_x_ptr,  # None for the pass over the sums
    partial_ptr,  # see all_brought; None from here on for the pass over grad_x
    counters_ptr,
    sums_ptr,  # [4, C] float64
    grad_weight_ptr,  # [C] each
    grad_bias_ptr,
    grad_threshold_ptr,  # [1] or [C], or None
    grad_leak_ptr,
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
    count,  # of the values of a channel
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
    if grad_x_ptr is not None:
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
        same_x = load_same(x_ptrs, mask, X_MOVES)
        same_g = load_same(g_ptrs, mask, G_MOVES)
        g_v, g_h = zero, zero
        grad_x_ptrs = None
        if grad_x_ptr is not None:
            grad_x_ptrs = grad_x_ptr + n
        if LONG:
            if grad_x_ptr is None:
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
                if grad_x_ptr is not None:
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
    if grad_x_ptr is None:
        c = channels_of(plane, cols, INDEX)
        totals = (sum_threshold, sum_leak, sum_grad, sum_dot)
        sums = ()
        for value in tl.static_range(4):
            sums += (over_neurons(totals[value].to(tl.float64), INDEX),)
        if all_brought(sums, partial_ptr, counters_ptr, c, channels, first, splits, group, 4):
            n = tl.cast(count, tl.float64)
            rstd = tl.load(rstd_ptr + c, mask=c < channels, other=0.0).to(tl.float64)
            found = ()
            for value in tl.static_range(4):
                found += (over_programs(sums, value, partial_ptr, c, channels, splits),)
                store_row(sums_ptr + value * channels, found[value], c, channels)
            store_row(grad_bias_ptr, found[2], c, channels)
            store_row(grad_mean_ptr, found[2] / n, c, channels)
            store_row(grad_weight_ptr, found[3] * rstd, c, channels)
            store_row(slope_ptr, found[3] / n * rstd * rstd, c, channels)
            if grad_threshold_ptr is not None:
                if THRESHOLDS:
                    store_row(grad_threshold_ptr, found[0], c, channels)
                if LEAKS:
                    store_row(grad_leak_ptr, found[1], c, channels)
                last = False
                if not (THRESHOLDS and LEAKS):
                    last = is_last(counters_ptr, groups)
                if last:
                    if not THRESHOLDS:
                        store_over_channels(grad_threshold_ptr, sums_ptr, channels)
                    if not LEAKS:
                        store_over_channels(grad_leak_ptr, sums_ptr + channels, channels)
