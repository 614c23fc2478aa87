"""The LIF neuron over T timesteps: one launch forward, one launch backward.

Bytes of global memory per neuron, b = bytes of one element of x:
  forward   reads T b, writes T b; the membrane stays in registers (v0, v: 4 each where given)
  backward  reads 2 T b (x and grad_s), writes T b; h is recomputed from x
  T > 8     backward also reads (T - 8) b of x again, writes and reads 4 per further segment
A current or gradient that is the same at every timestep (stride 0) is read once, not T times.

T <= 8 is one unrolled segment, longer sequences are a first one of (T - 1) % 8 + 1 timesteps and
then a loop over segments of 8. All loads of a segment come before its first store: the hardware
may not move a load across a store, and T loads in flight hide each other's latency.

A program takes 2 KiB of each timestep: with 4 warps that is one 16-byte access per thread, timestep
and tensor, the widest there is. T of them are in flight per thread, so that more would only cost
registers, and nothing is left for an autotuner to choose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iirsnn.ops.lif import empty_membrane

from .launch import (
    Launch,
    Launcher,
    check_current,
    code,
    gradient_in_order,
    in_order,
    is_in_order,
    now,
    planned,
)
from .step import (
    RESETS,
    SOFT_DELAYED,
    SURROGATES,
    backward_step,
    charge,
    discharge,
    discharge_again,
    number,
    spike,
    surrogate,
)
from .tiles import (
    columns,
    multiple,
    parameter,
    partial_slot,
    rows_of,
    split,
    store_partial,
    summed,
    tile,
)

SEGMENT = tl.constexpr(8)
_BLOCK_BYTES = 2048
_SIZES = [
    *("N", "x_stride_t", "grad_stride_t", "segments", "planes"),
    *("rows", "width", "row_stride", "plane_stride", "row_programs", "col_blocks"),
]


@triton.jit
def load_same(ptrs, mask, MOVES: tl.constexpr):
    """What every timestep has in common [ROWS, COLS], or None where they differ."""
    same = None
    if not MOVES:
        same = tl.load(ptrs, mask=mask, other=0.0)
    return same


@triton.jit
def load_steps(ptrs, stride_t, mask, same, STEPS: tl.constexpr):
    """-> STEPS times [ROWS, COLS]"""
    xs = ()
    for t in tl.static_range(STEPS):
        x = same
        if same is None:
            x = tl.load(ptrs + t * stride_t, mask=mask, other=0.0)
        xs += (x,)
    return xs


@triton.jit
def advance(
    v,  # [ROWS, COLS], None before the first timestep
    xs,
    s_ptrs,  # None: no spikes are written
    N,
    mask,
    threshold,
    leak,
    v_reset,
    RESET: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS timesteps forward -> v"""
    for t in tl.static_range(STEPS):
        h = charge(v, xs[t], threshold, leak, RESET)
        if s_ptrs is not None:
            s = spike(h, threshold)
            tl.store(s_ptrs + t * N, s.to(s_ptrs.dtype.element_ty), mask=mask)
        v = discharge(h, threshold, v_reset, RESET)
    return v


@triton.jit(do_not_specialize=_SIZES)
def lif_forward_kernel(
    x_ptr,
    threshold_ptr,
    leak_ptr,
    v0_ptr,  # or None
    s_ptr,
    v_ptr,  # or None
    N,
    x_stride_t,
    segments,
    rows,
    width,
    row_stride,
    plane_stride,
    row_programs,
    col_blocks,
    v_reset,
    RESET: tl.constexpr,
    FIRST: tl.constexpr,
    LONG: tl.constexpr,
    X_MOVES: tl.constexpr,
    THRESHOLD_INDEX: tl.constexpr,
    LEAK_INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    plane, row_block, col_block = split(tl.program_id(0), col_blocks, row_programs)
    v_reset = number(v_reset)
    N = multiple(N, VEC)
    width = multiple(width, VEC)
    stride_t = multiple(x_stride_t, VEC)
    cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
    threshold = parameter(threshold_ptr, plane, cols, width, THRESHOLD_INDEX)
    leak = parameter(leak_ptr, plane, cols, width, LEAK_INDEX)
    n = plane * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
    mask = (r < rows) & (cols < width)
    x_ptrs = x_ptr + n  # [ROWS, COLS]
    s_ptrs = s_ptr + n

    v = None
    if v0_ptr is not None:
        v = tl.load(v0_ptr + n, mask=mask, other=0.0)
    same = load_same(x_ptrs, mask, X_MOVES)
    xs = load_steps(x_ptrs, stride_t, mask, same, FIRST)
    v = advance(v, xs, s_ptrs, N, mask, threshold, leak, v_reset, RESET, FIRST)
    if LONG:
        for k in range(segments):
            t = FIRST + SEGMENT * tl.cast(k, tl.int64)
            xs_k = load_steps(x_ptrs + t * stride_t, stride_t, mask, same, SEGMENT)
            s_k = s_ptrs + t * N
            v = advance(v, xs_k, s_k, N, mask, threshold, leak, v_reset, RESET, SEGMENT)
    if v_ptr is not None:
        tl.store(v_ptr + n, v, mask=mask)


@triton.jit
def unwind(
    g_v,  # gradient of the membrane after the segment
    g_h,  # gradient of h one timestep after the segment
    sum_threshold,  # gradients of the parameters so far
    sum_leak,
    v,  # the membrane before the segment, None before the first timestep
    xs,
    gs,
    grad_x_ptrs,
    N,
    mask,
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
    """STEPS timesteps forward for h, then backward -> g_v, g_h, sum_threshold, sum_leak"""
    hs = ()
    v_t = v
    for t in tl.static_range(STEPS):
        hs += (charge(v_t, xs[t], threshold, leak, RESET),)
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
        tl.store(grad_x_ptrs + t * N, g_h.to(grad_x_ptrs.dtype.element_ty), mask=mask)
        sum_threshold += g_threshold
        if before is not None:
            sum_leak += g_h * before
    return g_v, g_h, sum_threshold, sum_leak


@triton.jit(do_not_specialize=_SIZES)
def lif_backward_kernel(
    grad_s_ptr,
    grad_v_ptr,  # or None
    x_ptr,
    threshold_ptr,
    leak_ptr,
    v0_ptr,  # or None
    grad_x_ptr,
    grad_v0_ptr,  # None if v0_ptr is
    partial_threshold_ptr,  # [programs, planes or columns], or None
    partial_leak_ptr,
    checkpoint_ptr,  # membranes [segments, N], None if not LONG
    N,
    x_stride_t,
    grad_stride_t,
    segments,
    planes,
    rows,
    width,
    row_stride,
    plane_stride,
    row_programs,
    col_blocks,
    v_reset,
    scale,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    FIRST: tl.constexpr,
    LONG: tl.constexpr,
    X_MOVES: tl.constexpr,
    G_MOVES: tl.constexpr,
    THRESHOLD_INDEX: tl.constexpr,
    LEAK_INDEX: tl.constexpr,
    INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    plane, row_program, col_block = split(tl.program_id(0), col_blocks, row_programs)
    v_reset, scale = number(v_reset), number(scale)
    N = multiple(N, VEC)
    width = multiple(width, VEC)
    x_stride = multiple(x_stride_t, VEC)
    g_stride = multiple(grad_stride_t, VEC)
    cols = columns(col_block, COLS)
    threshold = parameter(threshold_ptr, plane, cols, width, THRESHOLD_INDEX)
    leak = parameter(leak_ptr, plane, cols, width, LEAK_INDEX)
    inverse = 1.0 / threshold
    zero = tl.zeros([ROWS, COLS], tl.float32)
    sum_threshold = zero
    sum_leak = zero
    for row_block in range(row_program, tl.cdiv(rows, ROWS), row_programs):
        r = rows_of(row_block, ROWS)
        n = plane * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        mask = (r < rows) & (cols < width)
        x_ptrs = x_ptr + n  # [ROWS, COLS]
        g_ptrs = grad_s_ptr + n
        grad_x_ptrs = grad_x_ptr + n
        same_x = load_same(x_ptrs, mask, X_MOVES)
        same_g = load_same(g_ptrs, mask, G_MOVES)
        v0 = None
        if v0_ptr is not None:
            v0 = tl.load(v0_ptr + n, mask=mask, other=0.0)
        g_v = zero
        if grad_v_ptr is not None:
            g_v = tl.load(grad_v_ptr + n, mask=mask, other=0.0)
        g_h = zero

        if LONG:
            xs_0 = load_steps(x_ptrs, x_stride, mask, same_x, FIRST)
            v = advance(v0, xs_0, None, N, mask, threshold, leak, v_reset, RESET, FIRST)
            tl.store(checkpoint_ptr + n, v, mask=mask)
            for j in range(1, segments):
                t = FIRST + SEGMENT * tl.cast(j - 1, tl.int64)
                xs_j = load_steps(x_ptrs + t * x_stride, x_stride, mask, same_x, SEGMENT)
                v = advance(v, xs_j, None, N, mask, threshold, leak, v_reset, RESET, SEGMENT)
                tl.store(checkpoint_ptr + j * N + n, v, mask=mask)
            tl.debug_barrier()  # a checkpoint may come back to another thread than wrote it
            for i in range(segments):
                k = tl.cast(segments - 1 - i, tl.int64)
                t = FIRST + SEGMENT * k
                v_k = tl.load(checkpoint_ptr + k * N + n, mask=mask, other=0.0)
                g_v, g_h, sum_threshold, sum_leak = unwind(
                    g_v,
                    g_h,
                    sum_threshold,
                    sum_leak,
                    v_k,
                    load_steps(x_ptrs + t * x_stride, x_stride, mask, same_x, SEGMENT),
                    load_steps(g_ptrs + t * g_stride, g_stride, mask, same_g, SEGMENT),
                    grad_x_ptrs + t * N,
                    N,
                    mask,
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
        g_v, g_h, sum_threshold, sum_leak = unwind(
            g_v,
            g_h,
            sum_threshold,
            sum_leak,
            v0,
            load_steps(x_ptrs, x_stride, mask, same_x, FIRST),
            load_steps(g_ptrs, g_stride, mask, same_g, FIRST),
            grad_x_ptrs,
            N,
            mask,
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
        if v0_ptr is not None:
            if RESET == SOFT_DELAYED and not DETACH:
                u = v0 * inverse  # the spike of v0 takes part in the first timestep
                g_u = -threshold * g_h * (surrogate(u - 1.0, scale, SURROGATE) * inverse)
                sum_threshold -= g_u * u
                g_v += g_u
            tl.store(grad_v0_ptr + n, g_v, mask=mask)

    if partial_threshold_ptr is not None:
        slot = partial_slot(plane, row_program, col_block, planes, width, col_blocks, INDEX)
        store_partial(partial_threshold_ptr + slot, sum_threshold, cols, width, INDEX)
        store_partial(partial_leak_ptr + slot, sum_leak, cols, width, INDEX)


def segmented(timesteps: int) -> tuple[int, int]:
    """Timesteps of the first segment (1 to 8), and how many segments of 8 follow."""
    segments = (timesteps - 1) // SEGMENT.value
    return timesteps - segments * SEGMENT.value, segments


@planned
def _plan_forward(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    thresholds: int,
    leaks: int,
    reset: str,
) -> tuple[Launch, tuple[int, ...]]:
    """A launch, and the strides of the spikes."""
    first, segments = segmented(shape[0])
    tiles = tile(shape, strides, max(thresholds, leaks), _BLOCK_BYTES // dtype.itemsize)
    arguments = {
        **tiles.arguments,
        "N": tiles.N,
        "x_stride_t": strides[0],
        "segments": segments,
        "row_programs": tiles.row_blocks,
        "RESET": code(RESETS, "reset", reset),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "THRESHOLD_INDEX": tiles.index_of(thresholds),
        "LEAK_INDEX": tiles.index_of(leaks),
        "VEC": tiles.vector(dtype, strides[0]),
    }
    launch = Launch(lif_forward_kernel, tiles.programs(tiles.row_blocks), arguments)
    return launch, (tiles.N, *strides[1:])


def lif_forward(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor | None]:
    """x [T, *neurons] -> s [T, *neurons] in its dtype, v [*neurons] float32 (or None).

    threshold, leak: float32, contiguous, 1 or C elements; v0 [*neurons] float32. x[0] is dense in
    any dimension order, which everything that comes out has too. Raises TypeError, ValueError.
    """
    check_current(x)
    shape, how = x.shape, (threshold.numel(), leak.numel(), reset)
    plan, spike_strides = _plan_forward(shape, x.stride(), x.dtype, *how)
    s = x.new_empty_strided(shape, spike_strides)
    v = empty_membrane(x, True) if return_v else None
    if s.numel() > 0:
        if v0 is not None:
            v0 = in_order(v0, x)
        launch(plan, (x, threshold, leak, v0, s, v), v_reset)
    return s, v


class BackwardPlan(NamedTuple):
    """A launch, strides of grad_x, shapes of partial sums and of checkpoints."""

    launch: Launch
    strides: tuple[int, ...]
    partials: tuple[int, int]  # [programs, C]
    checkpoints: tuple[int, int] | None  # [segments, N]


@planned
def _plan_backward(
    shape: torch.Size,
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    dtype: torch.dtype,
    thresholds: int,
    leaks: int,
    reset: str,
    detach_reset: bool,
    surrogate: str,
) -> BackwardPlan | None:
    """None where grad_s is in another order than x."""
    if not is_in_order(grad_strides, strides, shape):
        return None
    first, segments = segmented(shape[0])
    tiles = tile(shape, strides, max(thresholds, leaks), _BLOCK_BYTES // dtype.itemsize)
    arguments = {
        **tiles.arguments,
        "N": tiles.N,
        "x_stride_t": strides[0],
        "grad_stride_t": grad_strides[0],
        "segments": segments,
        "planes": tiles.planes,
        "row_programs": tiles.row_programs,
        "RESET": code(RESETS, "reset", reset),
        "DETACH": detach_reset,
        "SURROGATE": code(SURROGATES, "surrogate", surrogate),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "G_MOVES": grad_strides[0] != 0,
        "THRESHOLD_INDEX": tiles.index_of(thresholds),
        "LEAK_INDEX": tiles.index_of(leaks),
        "INDEX": tiles.index,
        "VEC": tiles.vector(dtype, strides[0], grad_strides[0]),
    }
    launch = Launch(lif_backward_kernel, tiles.programs(tiles.row_programs), arguments)
    checkpoints = (segments, tiles.N) if segments else None
    return BackwardPlan(launch, (tiles.N, *strides[1:]), tiles.partials, checkpoints)


def lif_backward(
    grad_s: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    need_parameter_grads: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> grad_x [T, *neurons] in the dtype of x; grad_threshold, grad_leak, grad_v0 (or None).

    grad_s [T, *neurons], grad_v [*neurons] float32; the rest as for lif_forward.
    """
    check_current(x)
    thresholds, leaks, shape = threshold.numel(), leak.numel(), x.shape
    how = x.dtype, thresholds, leaks, reset, detach_reset, surrogate
    plan = _plan_backward(shape, x.stride(), grad_s.stride(), *how)
    if plan is None:
        grad_s = gradient_in_order(grad_s, x)
        plan = _plan_backward(shape, x.stride(), grad_s.stride(), *how)
    grad_x = x.new_empty_strided(shape, plan.strides)
    grad_v0 = None if v0 is None else empty_membrane(x, True)
    sums = sums_of_leak = checkpoints = None
    if need_parameter_grads:
        sums = x.new_empty(plan.partials, dtype=torch.float32)
        sums_of_leak = x.new_empty(plan.partials, dtype=torch.float32)
    if grad_x.numel() > 0:
        if plan.checkpoints is not None:
            checkpoints = x.new_empty(plan.checkpoints, dtype=torch.float32)
        if v0 is not None:
            v0 = in_order(v0, x)
        if grad_v is not None:
            grad_v = in_order(grad_v, x)
        launch(
            plan.launch,
            (
                *(grad_s, grad_v, x, threshold, leak, v0),
                *(grad_x, grad_v0, sums, sums_of_leak, checkpoints),
            ),
            v_reset,
            surrogate_scale,
        )
    return grad_x, summed(sums, thresholds), summed(sums_of_leak, leaks), grad_v0
