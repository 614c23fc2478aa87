"""The LIF neuron over T timesteps: one launch forward, one launch backward (lif_backward.py).

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
    in_order,
    now,
    planned,
)
from .step import (
    RESETS,
    charge,
    discharge,
    number,
    spike,
)
from .tiles import (
    SIZES,
    columns,
    multiple,
    parameter,
    rows_of,
    split,
    tile,
)

SEGMENT = tl.constexpr(8)
BLOCK_BYTES = 2048


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


@triton.jit(do_not_specialize=SIZES)
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
    row_blocks,
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
    plane, row_block, col_block = split(tl.program_id(0), col_blocks, row_blocks)
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
    tiles = tile(shape, strides, max(thresholds, leaks), BLOCK_BYTES // dtype.itemsize)
    arguments = {
        **tiles.arguments,
        "N": tiles.N,
        "x_stride_t": strides[0],
        "segments": segments,
        "row_blocks": tiles.row_blocks,
        "RESET": code(RESETS, "reset", reset),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "THRESHOLD_INDEX": tiles.index_of(thresholds),
        "LEAK_INDEX": tiles.index_of(leaks),
        "VEC": tiles.vector(dtype, strides[0]),
    }
    launch = Launch(lif_forward_kernel, tiles.programs, arguments)
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
