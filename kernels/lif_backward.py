"""The backward pass of the LIF neuron over T timesteps, in one launch: see lif.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Launch,
    Launcher,
    check_current,
    code,
    empty_gradient,
    in_order,
    is_in_order,
    now,
    planned,
    planned_in_order,
)
from .lif import BLOCK_BYTES, SEGMENT, advance, load_same, load_steps, segmented
from .step import (
    RESETS,
    SOFT_DELAYED,
    SURROGATES,
    backward_step,
    charge,
    discharge,
    discharge_again,
    number,
    surrogate,
)
from .sums import (
    channels_of,
    count_of,
    empty_sums,
    fitted,
    store_over_programs,
    workspace_of,
)
from .tiles import (
    AT_ONCE,
    SIZES,
    columns,
    multiple,
    parameter,
    place,
    rows_of,
    tile,
)


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


@triton.jit(do_not_specialize=SIZES)
def lif_backward_kernel(
    grad_s_ptr,
    grad_v_ptr,  # or None
    x_ptr,
    threshold_ptr,
    leak_ptr,
    v0_ptr,  # or None
    grad_x_ptr,
    grad_v0_ptr,  # None if v0_ptr is
    grad_threshold_ptr,  # [planes or columns] float32, or None
    grad_leak_ptr,
    partial_ptr,  # see all_brought
    counters_ptr,
    checkpoint_ptr,  # membranes [segments, N], None if not LONG
    N,
    x_stride_t,
    grad_stride_t,
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
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups
    v_reset, scale = number(v_reset), number(scale)
    N = multiple(N, VEC)
    width = multiple(width, VEC)
    x_stride = multiple(x_stride_t, VEC)
    g_stride = multiple(grad_stride_t, VEC)
    plane, row_block, col_block = place(first, group, col_blocks, INDEX)
    cols = columns(col_block, COLS)
    threshold = parameter(threshold_ptr, plane, cols, width, THRESHOLD_INDEX)
    leak = parameter(leak_ptr, plane, cols, width, LEAK_INDEX)
    inverse = 1.0 / threshold
    zero = tl.zeros([ROWS, COLS], tl.float32)
    sum_threshold = zero
    sum_leak = zero
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
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
            for i in range(1, segments):
                t = FIRST + SEGMENT * tl.cast(i - 1, tl.int64)
                xs_i = load_steps(x_ptrs + t * x_stride, x_stride, mask, same_x, SEGMENT)
                v = advance(v, xs_i, None, N, mask, threshold, leak, v_reset, RESET, SEGMENT)
                tl.store(checkpoint_ptr + i * N + n, v, mask=mask)
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

    if grad_threshold_ptr is not None:
        store_over_programs(
            (sum_threshold, sum_leak),
            (grad_threshold_ptr, grad_leak_ptr),
            partial_ptr,
            counters_ptr,
            channels_of(plane, cols, INDEX),
            count_of(groups, width, INDEX),
            first,
            splits,
            group,
            2,
            INDEX,
        )


class BackwardPlan(NamedTuple):
    """A launch, strides of grad_x, how sums are shared, and the shape of checkpoints."""

    launch: Launch
    strides: tuple[int, ...]
    shared: tuple[int, int, int]  # see workspace_of
    checkpoints: tuple[int, int] | None  # [segments, N]


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
    sums: bool,
) -> BackwardPlan | None:
    """None where grad_s is in another order than x."""
    if not is_in_order(grad_strides, strides, shape):
        return None
    first, segments = segmented(shape[0])
    block, most = BLOCK_BYTES // dtype.itemsize, AT_ONCE * processors if sums else 0
    tiles = tile(shape, strides, max(thresholds, leaks), block, most)
    arguments = {
        **tiles.arguments,
        "N": tiles.N,
        "x_stride_t": strides[0],
        "grad_stride_t": grad_strides[0],
        "segments": segments,
        **tiles.summing,
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
    launch = Launch(lif_backward_kernel, tiles.groups * tiles.splits, arguments)
    checkpoints = (segments, tiles.N) if segments else None
    return BackwardPlan(launch, (tiles.N, *strides[1:]), tiles.shared, checkpoints)


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
    thresholds, leaks = threshold.numel(), leak.numel()
    how = thresholds, leaks, reset, detach_reset, surrogate, need_parameter_grads
    grad_s, plan = planned_in_order(_plan_backward, grad_s, x, *how)
    grad_x, grad_v0 = empty_gradient(x, x.shape, plan.strides), None
    if v0 is not None:
        grad_v0 = empty_gradient(x, x.shape[1:], x.stride()[1:], torch.float32)
    grad_threshold = grad_leak = checkpoints = None
    if grad_x.numel() > 0:
        workspace: tuple[Tensor | None, Tensor | None] = None, None
        if need_parameter_grads:
            grad_threshold, grad_leak = empty_sums(x, plan.shared), empty_sums(x, plan.shared)
            workspace = workspace_of(x, *plan.shared, 2, launch)
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
                *(grad_x, grad_v0, grad_threshold, grad_leak, *workspace, checkpoints),
            ),
            v_reset,
            surrogate_scale,
        )
    elif need_parameter_grads:
        grad_threshold, grad_leak = torch.zeros_like(threshold), torch.zeros_like(leak)
    return grad_x, fitted(grad_threshold, thresholds), fitted(grad_leak, leaks), grad_v0
