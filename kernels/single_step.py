"""The LIF neuron at T = 1 without a membrane before it: a comparison, and that is all.

Bytes of global memory per neuron, b = bytes of one element of x:
  forward   reads b, writes b
  backward  reads 2 b (x and grad_s), writes b
No membrane is read or written, no leak and no reset takes part; the gradient of leak is 0.

A program takes 4 KiB of x: two 16-byte accesses in flight per thread and tensor with 4 warps. One
would do at full occupancy, the second covers the start and end of the short programs. A block that
lies wholly inside a row is loaded without a mask, so that an odd N costs wide accesses in the last
block only.
"""

from __future__ import annotations

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
    is_in_order,
    now,
    planned,
    planned_in_order,
)
from .step import SURROGATES, number, spike, surrogate
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
    is_whole,
    multiple,
    parameter,
    place,
    rows_of,
    split,
    tile,
)

_BLOCK_BYTES = 4096


@triton.jit
def fire(x_ptrs, s_ptrs, threshold, mask):
    s = spike(tl.load(x_ptrs, mask=mask).to(tl.float32), threshold)
    tl.store(s_ptrs, s.to(s_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def single_step_forward_kernel(
    x_ptr,
    threshold_ptr,
    s_ptr,
    rows,
    width,
    row_stride,
    plane_stride,
    row_blocks,
    col_blocks,
    THRESHOLD_INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    plane, row_block, col_block = split(tl.program_id(0), col_blocks, row_blocks)
    width = multiple(width, VEC)
    cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
    threshold = parameter(threshold_ptr, plane, cols, width, THRESHOLD_INDEX)
    n = plane * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
    x_ptrs, s_ptrs = x_ptr + n, s_ptr + n  # [ROWS, COLS]
    if is_whole(row_block, col_block, rows, width, ROWS, COLS):
        fire(x_ptrs, s_ptrs, threshold, None)
    else:
        fire(x_ptrs, s_ptrs, threshold, (r < rows) & (cols < width))


@triton.jit
def fire_backward(
    sum_threshold,  # [ROWS, COLS], the gradient so far
    grad_s_ptrs,
    x_ptrs,
    grad_x_ptrs,
    threshold,
    mask,
    scale,
    SURROGATE: tl.constexpr,
):
    other = None if mask is None else 0.0
    g = tl.load(grad_s_ptrs, mask=mask, other=other).to(tl.float32)
    h = tl.load(x_ptrs, mask=mask, other=other).to(tl.float32)
    inverse = 1.0 / threshold
    u = h * inverse
    g_h = g * (surrogate(u - 1.0, scale, SURROGATE) * inverse)
    tl.store(grad_x_ptrs, g_h.to(grad_x_ptrs.dtype.element_ty), mask=mask)
    return sum_threshold - g_h * u


@triton.jit(do_not_specialize=SIZES)
def single_step_backward_kernel(
    grad_s_ptr,
    x_ptr,
    threshold_ptr,
    grad_x_ptr,
    grad_threshold_ptr,  # [planes or columns] float32, or None
    partial_ptr,  # see all_brought
    counters_ptr,
    rows,
    width,
    row_stride,
    plane_stride,
    col_blocks,
    groups,
    tiles,
    splits,
    scale,
    SURROGATE: tl.constexpr,
    THRESHOLD_INDEX: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups
    scale = number(scale)
    width = multiple(width, VEC)
    plane, row_block, col_block = place(first, group, col_blocks, THRESHOLD_INDEX)
    cols = columns(col_block, COLS)
    threshold = parameter(threshold_ptr, plane, cols, width, THRESHOLD_INDEX)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for j in range(first, tiles, splits):
        plane_j, row_block, col_block = place(j, group, col_blocks, THRESHOLD_INDEX)
        cols, r = columns(col_block, COLS), rows_of(row_block, ROWS)
        n = plane_j * multiple(plane_stride, VEC) + r * multiple(row_stride, VEC) + cols
        g_ptrs, x_ptrs, out_ptrs = grad_s_ptr + n, x_ptr + n, grad_x_ptr + n
        if is_whole(row_block, col_block, rows, width, ROWS, COLS):
            total = fire_backward(
                total, g_ptrs, x_ptrs, out_ptrs, threshold, None, scale, SURROGATE
            )
        else:
            mask = (r < rows) & (cols < width)
            total = fire_backward(
                total, g_ptrs, x_ptrs, out_ptrs, threshold, mask, scale, SURROGATE
            )
    if grad_threshold_ptr is not None:
        store_over_programs(
            (total,),
            (grad_threshold_ptr,),
            partial_ptr,
            counters_ptr,
            channels_of(plane, cols, THRESHOLD_INDEX),
            count_of(groups, width, THRESHOLD_INDEX),
            first,
            splits,
            group,
            1,
            THRESHOLD_INDEX,
        )


@planned
def _plan_forward(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, thresholds: int
) -> tuple[Launch, tuple[int, ...]]:
    """A launch, and the strides of the spikes."""
    tiles = tile(shape, strides, thresholds, _BLOCK_BYTES // dtype.itemsize)
    arguments = {
        **tiles.arguments,
        "row_blocks": tiles.row_blocks,
        "THRESHOLD_INDEX": tiles.index,
        "VEC": tiles.vector(dtype),
    }
    launch = Launch(single_step_forward_kernel, tiles.programs, arguments)
    return launch, (tiles.N, *strides[1:])


def single_step_forward(x: Tensor, threshold: Tensor, launch: Launcher = now) -> Tensor:
    """x [1, *neurons] -> s [1, *neurons] in its dtype; threshold float32, 1 or C elements."""
    check_current(x)
    shape = x.shape
    plan, spike_strides = _plan_forward(shape, x.stride(), x.dtype, threshold.numel())
    s = x.new_empty_strided(shape, spike_strides)
    if s.numel() > 0:
        launch(plan, (x, threshold, s))
    return s


@planned
def _plan_backward(
    shape: torch.Size,
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    dtype: torch.dtype,
    processors: int,
    thresholds: int,
    surrogate: str,
    sums: bool,
) -> tuple[Launch, tuple[int, ...], tuple[int, int, int]] | None:
    """A launch, strides of grad_x, how sums are shared (see workspace_of); None as in lif.py."""
    if not is_in_order(grad_strides, strides, shape):
        return None
    most = AT_ONCE * processors if sums else 0
    tiles = tile(shape, strides, thresholds, _BLOCK_BYTES // dtype.itemsize, most)
    arguments = {
        **tiles.arguments,
        **tiles.summing,
        "SURROGATE": code(SURROGATES, "surrogate", surrogate),
        "THRESHOLD_INDEX": tiles.index,
        "VEC": tiles.vector(dtype),
    }
    launch = Launch(single_step_backward_kernel, tiles.groups * tiles.splits, arguments)
    return launch, (tiles.N, *strides[1:]), tiles.shared


def single_step_backward(
    grad_s: Tensor,
    x: Tensor,
    threshold: Tensor,
    surrogate: str,
    surrogate_scale: float,
    need_parameter_grads: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor | None]:
    """-> grad_x [1, *neurons] in the dtype of x, grad_threshold (or None)."""
    check_current(x)
    how = threshold.numel(), surrogate, need_parameter_grads
    grad_s, plan = planned_in_order(_plan_backward, grad_s, x, *how)
    planned_launch, strides, shared = plan
    grad_x, grad_threshold = empty_gradient(x, x.shape, strides), None
    if grad_x.numel() > 0:
        workspace: tuple[Tensor | None, Tensor | None] = None, None
        if need_parameter_grads:
            grad_threshold = empty_sums(x, shared)
            workspace = workspace_of(x, *shared, 1, launch)
        tensors = grad_s, x, threshold, grad_x, grad_threshold, *workspace
        launch(planned_launch, tensors, surrogate_scale)
    elif need_parameter_grads:
        grad_threshold = torch.zeros_like(threshold)
    return grad_x, fitted(grad_threshold, threshold.numel())
