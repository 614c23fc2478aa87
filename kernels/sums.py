"""How the programs of a launch add up their sums: gradients of parameters, without a second launch.

A program stores its sums, float32 in itself and float64 from there on, as row p of [programs, C].
Of CLUSTER programs that share channels the last to be done adds up their rows, and the last of the
clusters those: always in one order, whichever comes last. Who comes last is counted: the counters
are 0 before a launch and after it.

What the others stored is seen by the last: a barrier brings all threads' stores before the count,
which releases them and acquires those of others, on the whole GPU, and another one brings the
loads behind it, from the cache that all processors share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, now
from .tiles import COLUMN

CLUSTER = tl.constexpr(32)
_ROWS = tl.constexpr(256)  # that are added at once where there is one channel

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters_of(x: Tensor, count: int, launch: Launcher) -> Tensor:
    """`count` of them at least, all 0: one tensor serves all launches of a stream.

    A graph has its own, zeroed at each replay, for it may be replayed beside launches of the stream
    that it was captured on; so has code that is traced.
    """
    if launch is not now or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x.new_zeros(count, dtype=torch.int32)
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
    kept = _counters.get((x.device, stream))
    if kept is None or kept.numel() < count:
        kept = torch.zeros(max(count, 1024), dtype=torch.int32, device=x.device)
        _counters[x.device, stream] = kept
    return kept


def empty_sums(x: Tensor, shared: tuple[int, int, int]) -> Tensor:
    """What sum_over_programs writes: one a channel."""
    return x.new_empty(shared[1], dtype=torch.float32)


def workspace_of(
    x: Tensor, programs: int, channels: int, groups: int, values: int, launch: Launcher
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Rows and counters for `programs` that share each channel; None where that is one program.

    groups: of programs that share channels with each other.
    """
    if isinstance(programs, int) and programs == 1:
        return None, None
    clusters = triton.cdiv(programs, CLUSTER.value)
    rows = x.new_empty(values * (programs + clusters), channels, dtype=torch.float64)
    return rows, counters_of(x, groups * (1 + clusters), launch)


@triton.jit
def is_last(counter_ptr, count):
    """Whether this program is the last of `count` to come here."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1 == count
    tl.debug_barrier()
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def store_row(ptr, total, plane, cols, width, INDEX: tl.constexpr):
    """total per column [1, COLS], or a number, into [C]."""
    if INDEX == COLUMN:
        tl.store(ptr + cols, total.to(ptr.dtype.element_ty), mask=cols < width)
    else:
        tl.store(ptr + plane, total.to(ptr.dtype.element_ty))


@triton.jit
def add_rows(
    ptr, first, count, channels, plane, cols, width, COLS: tl.constexpr, INDEX: tl.constexpr
):
    """Rows [first, first + count) of [rows, C], as store_row takes them."""
    if INDEX == COLUMN:
        total = tl.zeros([CLUSTER, COLS], tl.float64)
        for start in range(0, count, CLUSTER):
            k = (start + tl.arange(0, CLUSTER))[:, None]
            at = (first + tl.cast(k, tl.int64)) * channels + cols
            mask = (k < count) & (cols < width)
            total += tl.load(ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        found = tl.sum(total, 0, keep_dims=True)
    else:
        total = tl.zeros([_ROWS], tl.float64)
        for start in range(0, count, _ROWS):
            k = start + tl.arange(0, _ROWS)
            at = (first + tl.cast(k, tl.int64)) * channels + plane
            total += tl.load(ptr + at, mask=k < count, other=0.0, cache_modifier=".cg")
        found = tl.sum(total)
    return found


@triton.jit
def sum_over_programs(
    totals,  # [ROWS, COLS] of this program, one for each of grad_ptrs
    grad_ptrs,  # [C] each
    partial_ptr,  # [values, programs + clusters, C] float64, or None: one program has them all
    counters_ptr,  # [groups, 1 + clusters], or None
    plane,
    row_program,
    col_block,
    cols,
    planes,
    width,
    row_programs,
    col_blocks,
    VALUES: tl.constexpr,
    INDEX: tl.constexpr,
    COLS: tl.constexpr,
):
    by_column = ()
    for value in tl.static_range(VALUES):
        own = tl.sum(totals[value], 0, keep_dims=True)
        if INDEX != COLUMN:
            own = tl.sum(own)
        by_column += (own,)
    if partial_ptr is None:
        for value in tl.static_range(VALUES):
            store_row(grad_ptrs[value], by_column[value], plane, cols, width, INDEX)
    else:
        p, programs, group, channels = row_program, row_programs, col_block, width
        if INDEX != COLUMN:
            p, programs = row_program * col_blocks + col_block, row_programs * col_blocks
            group, channels = plane, planes
        channels = tl.cast(channels, tl.int64)
        clusters = tl.cdiv(programs, CLUSTER)
        cluster = p // CLUSTER
        for value in tl.static_range(VALUES):
            rows = partial_ptr + value * (programs + clusters) * channels
            store_row(rows + p * channels, by_column[value], plane, cols, width, INDEX)
        counter = counters_ptr + tl.cast(group, tl.int64) * (1 + clusters)
        first = cluster * CLUSTER
        count = tl.minimum(CLUSTER, programs - first)
        if is_last(counter + 1 + cluster, count):
            for value in tl.static_range(VALUES):
                rows = partial_ptr + value * (programs + clusters) * channels
                several = add_rows(rows, first, count, channels, plane, cols, width, COLS, INDEX)
                to = rows + (programs + cluster) * channels
                store_row(to, several, plane, cols, width, INDEX)
            if is_last(counter, clusters):
                for value in tl.static_range(VALUES):
                    rows = partial_ptr + value * (programs + clusters) * channels
                    every = add_rows(
                        rows, programs, clusters, channels, plane, cols, width, COLS, INDEX
                    )
                    store_row(grad_ptrs[value], every, plane, cols, width, INDEX)


def fitted(grad: Tensor | None, elements: int) -> Tensor | None:
    """grad [C] -> the gradient of a parameter of that many elements, 1 or C."""
    if grad is None or grad.shape[0] == elements:
        return grad
    return grad.sum().view(1)
