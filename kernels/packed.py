"""Spikes as bits: the LIF neuron with packed output, and the way back. No gradient.

Bit j of byte k of a timestep is neuron 8k + j in memory order; a timestep is padded with zero bits
to a multiple of 64 neurons. A NaN spike becomes a 0.

Bytes of global memory per neuron, b = bytes of one element:
  forward  reads T b, writes T / 8 (v0, v: 4 each where given)
  unpack   reads T / 8, writes T b

A byte of spikes may cut across rows of the tiles of lif.py, so a program takes a plain block of
neurons here, as [bytes, 8], and finds the channel of each by division: once for all timesteps and,
where rows are whole bytes, once for 8 neurons. A block is 2 KiB of each timestep, or 8 KiB at
T = 1: with 4 warps that is T or 4 16-byte loads in flight per thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from iirsnn.ops.lif import empty_bits, empty_membrane

from .launch import Launch, Launcher, check_current, code, in_order, now, planned
from .lif import SEGMENT, load_same, load_steps, segmented
from .step import RESETS, charge, discharge, number
from .tiles import COLUMN, ONE, multiple, tile, vector

_BLOCK_BYTES = 2048
_SINGLE_STEP_BLOCK_BYTES = 8192
_UNPACK_BYTES = 128  # 1024 neurons: 2 or 1 16-byte stores per thread


@triton.jit
def pack(fired):
    """bool [BYTES, 8] -> uint8 [BYTES]"""
    return tl.sum(fired.to(tl.int32) << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def channel_parameter(
    ptr,
    byte,  # [BYTES, 1]
    N,
    channels,
    inner,
    INDEX: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,  # no byte holds parts of two rows
):
    """threshold or leak: a scalar, [BYTES, 1] or [BYTES, 8]."""
    if INDEX == ONE:
        p = tl.load(ptr)
    elif not WHOLE_BYTES:
        n = 8 * byte + tl.arange(0, 8)[None, :]
        p = tl.load(ptr + n // inner % channels, mask=n < N, other=1.0)
    elif INDEX == COLUMN:
        channel = 8 * byte % channels + tl.arange(0, 8)[None, :]
        p = tl.load(ptr + channel, mask=8 * byte < N, other=1.0)
    else:
        p = tl.load(ptr + 8 * byte // inner % channels, mask=8 * byte < N, other=1.0)
    return p


@triton.jit
def advance_packed(
    v,  # [BYTES, 8], None before the first timestep
    xs,
    bits_ptrs,  # [BYTES]
    row_bytes,
    mask,
    bits_mask,
    threshold,
    leak,
    v_reset,
    RESET: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS timesteps forward -> v"""
    for t in tl.static_range(STEPS):
        h = charge(v, xs[t], threshold, leak, RESET)
        tl.store(bits_ptrs + t * row_bytes, pack((h > threshold) & mask), mask=bits_mask)
        v = discharge(h, threshold, v_reset, RESET)
    return v


@triton.jit(do_not_specialize=("N", "x_stride_t", "segments", "row_bytes", "channels", "inner"))
def lif_packed_kernel(
    x_ptr,
    threshold_ptr,
    leak_ptr,
    v0_ptr,  # or None
    bits_ptr,
    v_ptr,  # or None
    N,
    x_stride_t,
    segments,
    row_bytes,
    channels,
    inner,
    v_reset,
    RESET: tl.constexpr,
    FIRST: tl.constexpr,
    LONG: tl.constexpr,
    X_MOVES: tl.constexpr,
    THRESHOLD_INDEX: tl.constexpr,
    LEAK_INDEX: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    VEC: tl.constexpr,
    BYTES: tl.constexpr,
):
    v_reset = number(v_reset)
    N = multiple(N, VEC)
    stride_t = multiple(x_stride_t, VEC)
    row_bytes = tl.cast(row_bytes, tl.int64)
    k = tl.cast(tl.program_id(0), tl.int64) * BYTES + tl.arange(0, BYTES)  # [BYTES]
    byte = k[:, None]
    n = 8 * byte + tl.arange(0, 8)[None, :]  # [BYTES, 8]
    mask, bits_mask = n < N, k < row_bytes
    threshold = channel_parameter(
        threshold_ptr, byte, N, channels, inner, THRESHOLD_INDEX, WHOLE_BYTES
    )
    leak = channel_parameter(leak_ptr, byte, N, channels, inner, LEAK_INDEX, WHOLE_BYTES)
    x_ptrs = x_ptr + n
    bits_ptrs = bits_ptr + k

    v = None
    if v0_ptr is not None:
        v = tl.load(v0_ptr + n, mask=mask, other=0.0)
    same = load_same(x_ptrs, mask, X_MOVES)
    xs = load_steps(x_ptrs, stride_t, mask, same, FIRST)
    v = advance_packed(
        v, xs, bits_ptrs, row_bytes, mask, bits_mask, threshold, leak, v_reset, RESET, FIRST
    )
    if LONG:
        for i in range(segments):
            t = FIRST + SEGMENT * tl.cast(i, tl.int64)
            xs_i = load_steps(x_ptrs + t * stride_t, stride_t, mask, same, SEGMENT)
            v = advance_packed(
                v,
                xs_i,
                bits_ptrs + t * row_bytes,
                row_bytes,
                mask,
                bits_mask,
                threshold,
                leak,
                v_reset,
                RESET,
                SEGMENT,
            )
    if v_ptr is not None:
        tl.store(v_ptr + n, v, mask=mask)


@triton.jit(do_not_specialize=("N", "row_bytes", "blocks"))
def unpack_kernel(bits_ptr, s_ptr, N, row_bytes, blocks, VEC: tl.constexpr, BYTES: tl.constexpr):
    t = tl.cast(tl.program_id(0) // blocks, tl.int64)
    N = multiple(N, VEC)
    byte = (tl.cast(tl.program_id(0) % blocks, tl.int64) * BYTES + tl.arange(0, BYTES))[:, None]
    n = 8 * byte + tl.arange(0, 8)[None, :]  # [BYTES, 8]
    bits = tl.load(bits_ptr + t * row_bytes + byte, mask=8 * byte < N, other=0)
    s = ((bits >> tl.arange(0, 8)[None, :]) & 1).to(tl.float32)
    tl.store(s_ptr + t * N + n, s.to(s_ptr.dtype.element_ty), mask=n < N)


@planned
def _plan_packed(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    thresholds: int,
    leaks: int,
    row_bytes: int,
    reset: str,
) -> Launch:
    first, segments = segmented(shape[0])
    channels = max(thresholds, leaks)
    tiles = tile(shape, strides, channels, 1)
    single = segments == 0 and first == 1
    block = (_SINGLE_STEP_BLOCK_BYTES if single else _BLOCK_BYTES) // dtype.itemsize
    arguments = {
        "N": tiles.N,
        "x_stride_t": strides[0],
        "segments": segments,
        "row_bytes": row_bytes,
        "channels": channels,
        "inner": strides[2] if channels > 1 else 1,
        "RESET": code(RESETS, "reset", reset),
        "FIRST": first,
        "LONG": segments > 0,
        "X_MOVES": strides[0] != 0,
        "THRESHOLD_INDEX": tiles.index_of(thresholds),
        "LEAK_INDEX": tiles.index_of(leaks),
        "WHOLE_BYTES": tiles.width % 8 == 0,
        "VEC": vector(dtype, tiles.N, strides[0]),
        "BYTES": block // 8,
    }
    return Launch(lif_packed_kernel, triton.cdiv(8 * row_bytes, block), arguments)


def lif_packed(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor]:
    """x [T, *neurons] -> bits uint8 [T, 8 * ceil(N / 64)], v [*neurons] float32 (or empty).

    Arguments, layout and errors as for lif.lif_forward.
    """
    check_current(x)
    bits, v = empty_bits(x), empty_membrane(x, return_v)
    if x.numel() == 0:
        return bits, v
    sizes = threshold.numel(), leak.numel(), bits.shape[1]
    plan = _plan_packed(x.shape, x.stride(), x.dtype, *sizes, reset)
    if v0 is not None:
        v0 = in_order(v0, x)
    launch(plan, (x, threshold, leak, v0, bits, v if return_v else None), v_reset)
    return bits, v


@planned
def _plan_unpack(size: tuple[int, ...], row_bytes: int, dtype: torch.dtype) -> Launch:
    neurons = math.prod(size[1:])
    blocks = triton.cdiv(neurons, 8 * _UNPACK_BYTES)
    arguments = {
        "N": neurons,
        "row_bytes": row_bytes,
        "blocks": blocks,
        "VEC": vector(dtype, neurons),
        "BYTES": _UNPACK_BYTES,
    }
    return Launch(unpack_kernel, blocks * size[0], arguments)


def unpack_spikes(
    bits: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    launch: Launcher = now,
) -> Tensor:
    """bits uint8 [T, 8 * ceil(N / 64)] -> spikes of `size` [T, *neurons] with a dense `stride`."""
    s = bits.new_empty_strided(size, stride, dtype=dtype)
    if s.numel() > 0:
        launch(_plan_unpack(tuple(size), bits.stride(0), dtype), (bits, s))
    return s
