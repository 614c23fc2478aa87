"""How the programs of a launch add up their sums, without a second launch.

A program stores its sums, float64 from there on, as a row of [programs, C]. Of CLUSTER programs
that share channels the last to be done adds up their rows, and the last of the clusters those:
always in one order, whichever comes last. Who comes last is counted: the counters are 0 before a
launch and after it.

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
_ROWS = tl.constexpr(256)  # at most, that are added at once where there is one channel

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
    """What store_over_programs writes: one a channel."""
    return x.new_empty(shared[1], dtype=torch.float32)


def workspace_of(
    x: Tensor,
    programs: int,
    channels: int,
    groups: int,
    values: int,
    launch: Launcher,
    over_groups: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Rows and counters for `programs` that share each channel; no rows where that is one program.

    groups: of programs that share channels with each other; over_groups: whether the last of those
    has something to do, for which there is a counter too.
    """
    alone = isinstance(programs, int) and programs == 1
    clusters = (programs + CLUSTER.value - 1) // CLUSTER.value
    rows = counters = None
    if not alone:
        rows = x.new_empty(values * (programs + clusters), channels, dtype=torch.float64)
    if over_groups or not alone:
        counters = counters_of(x, 1 + groups * (1 + clusters), launch)
    return rows, counters


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
def channels_of(plane, cols, INDEX: tl.constexpr):
    """The channels of a program [1, n]."""
    at = cols
    if INDEX != COLUMN:
        at = tl.full([1, 1], plane, tl.int64)
    return at


@triton.jit
def count_of(groups, width, INDEX: tl.constexpr):
    """Of all channels."""
    count = groups
    if INDEX == COLUMN:
        count = width
    return count


@triton.jit
def over_neurons(total, INDEX: tl.constexpr):
    """[ROWS, COLS] -> its sums for the channels of a program [1, n]."""
    if INDEX == COLUMN:
        found = tl.sum(total, 0, keep_dims=True)
    else:
        found = tl.full([1, 1], tl.sum(total), total.dtype)
    return found


@triton.jit
def store_row(ptr, sums, at, channels):
    """sums [1, n] of the channels `at`, into [C]."""
    tl.store(ptr + at, sums.to(ptr.dtype.element_ty), mask=at < channels)


@triton.jit
def add_rows(ptr, first, count, at, channels):
    """Rows [first, first + count) of [rows, C] float64 -> their sums [1, n] for channels `at`."""
    ROWS: tl.constexpr = CLUSTER if at.shape[1] > 1 else _ROWS
    total = tl.zeros([1, at.shape[1]], tl.float64)
    for start in range(0, count, ROWS):
        k = (start + tl.arange(0, ROWS))[:, None]
        row = ptr + (first + tl.cast(k, tl.int64)) * channels
        mask = (k < count) & (at < channels)
        several = tl.load(row + at, mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.sum(several, 0, keep_dims=True)
    return total


@triton.jit
def all_brought(
    sums,  # of this program: VALUES times [1, n]
    partial_ptr,  # [VALUES, programs + clusters, C] float64, or None: one program has them all
    counters_ptr,  # [1 + groups * (1 + clusters)], the first for is_last of groups; or None
    at,  # channels_of this program
    channels,
    program,  # of those of its group
    programs,
    group,
    VALUES: tl.constexpr,
):
    """Whether the sums of all programs of the group are there: in the last, which over_programs."""
    last = True
    if partial_ptr is not None:
        width = tl.cast(channels, tl.int64)
        clusters = tl.cdiv(programs, CLUSTER)
        rows = (programs + clusters) * width
        for value in tl.static_range(VALUES):
            row = partial_ptr + value * rows + program * width
            store_row(row, sums[value], at, channels)
        counter = counters_ptr + 1 + tl.cast(group, tl.int64) * (1 + clusters)
        last = clusters == 1
        if clusters > 1:
            cluster = program // CLUSTER
            first = cluster * CLUSTER
            count = tl.minimum(CLUSTER, programs - first)
            last = is_last(counter + 1 + cluster, count)
            if last:
                for value in tl.static_range(VALUES):
                    several = partial_ptr + value * rows
                    found = add_rows(several, first, count, at, width)
                    store_row(several + (programs + cluster) * width, found, at, channels)
        if last:
            last = is_last(counter, tl.where(clusters > 1, clusters, programs))
    return last


@triton.jit
def over_programs(sums, value: tl.constexpr, partial_ptr, at, channels, programs):
    """One of the sums of all programs [1, n] float64, where they are all_brought."""
    if partial_ptr is None:
        found = sums[value].to(tl.float64)
    else:
        width = tl.cast(channels, tl.int64)
        clusters = tl.cdiv(programs, CLUSTER)
        first = tl.where(clusters > 1, programs, 0)
        count = tl.where(clusters > 1, clusters, programs)
        rows = partial_ptr + value * (programs + clusters) * width
        found = add_rows(rows, first, count, at, width)
    return found


@triton.jit
def store_over_channels(ptr, sums_ptr, channels):
    """The sum of [C] float64, as one number."""
    first = tl.zeros([1, 1], tl.int64)
    store_row(ptr, add_rows(sums_ptr, 0, channels, first, 1), first, 1)


@triton.jit
def store_over_programs(
    totals,  # [ROWS, COLS] of this program, one for each of grad_ptrs
    grad_ptrs,  # [C] each
    partial_ptr,  # see all_brought
    counters_ptr,
    at,
    channels,
    program,
    programs,
    group,
    VALUES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The sums of each channel, by the last program that has some."""
    sums = ()
    for value in tl.static_range(VALUES):
        sums += (over_neurons(totals[value], INDEX),)
    if all_brought(sums, partial_ptr, counters_ptr, at, channels, program, programs, group, VALUES):
        for value in tl.static_range(VALUES):
            found = over_programs(sums, value, partial_ptr, at, channels, programs)
            store_row(grad_ptrs[value], found, at, channels)


def fitted(grad: Tensor | None, elements: int) -> Tensor | None:
    """grad [C] -> the gradient of a parameter of that many elements, 1 or C."""
    if grad is None or grad.shape[0] == elements:
        return grad
    return grad.sum().view(1)
