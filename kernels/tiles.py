"""How the neurons of a timestep are cut into tiles, so that a tile reads few parameters.

Neurons are numbered in memory order. With a parameter for each of C channels, the channel of
neuron n is (n // inner) % C, and no tile divides by anything to find it:
  one parameter for all   one row of N neurons
  inner > 1 (contiguous)  a plane for each channel: rows of `inner` neurons, C * inner apart
  inner = 1 (channels_last, fully connected)  rows of C neurons; the channel is the column
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Where the index of a parameter comes from.
ONE = tl.constexpr(0)
PLANE = tl.constexpr(1)
COLUMN = tl.constexpr(2)

#: Of the arguments of kernels, those that are sizes and strides: none of them is compiled in.
SIZES = [
    *("N", "x_stride_t", "grad_stride_t", "timesteps", "segments", "channels", "count", "repeated"),
    *("rows", "width", "row_stride", "plane_stride", "row_blocks", "col_blocks"),
    *("groups", "tiles", "splits"),
]

# Programs of 128 threads, on a multiprocessor, that share a pass with sums.
AT_ONCE = 4
# Most programs of a pass without, where columns have parameters, which each program loads.
_PROGRAMS = 2048

# Columns of a tile whose parameters differ by column: short rows leave more neurons of a channel in
# the tile, hence fewer partial sums; 64 are still 128 bytes of bfloat16, a whole cache line.
_COLUMNS = 64


class Tiling(NamedTuple):
    """A timestep of N neurons cut into tiles of ROWS x COLS.

    Memory position of (plane, row, column): plane * plane_stride + row * row_stride + column.
    """

    planes: int
    rows: int
    width: int
    row_stride: int
    plane_stride: int
    rows_per_tile: int
    cols_per_tile: int
    index: int  # of a parameter with C elements: PLANE or COLUMN; ONE when C is 1
    most: int  # programs of a pass that sums, or 0

    @property
    def N(self) -> int:
        return self.planes * self.rows * self.width

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.rows, self.rows_per_tile)

    @property
    def col_blocks(self) -> int:
        return triton.cdiv(self.width, self.cols_per_tile)

    @property
    def programs(self) -> int:
        """One a tile."""
        return self.planes * self.row_blocks * self.col_blocks

    @property
    def groups(self) -> int:
        """Of tiles that share channels: a plane or a block of columns each."""
        return self.col_blocks if self.index == COLUMN.value else self.planes

    @property
    def tiles(self) -> int:
        """Of a group."""
        return self.row_blocks if self.index == COLUMN.value else self.row_blocks * self.col_blocks

    @property
    def splits(self) -> int:
        """Programs that share the tiles of a group, where each may sum over its own."""
        if self.most == 0 and self.index != COLUMN.value:
            return self.tiles
        return torch.sym_min(self.tiles, max(1, (self.most or _PROGRAMS) // self.groups))

    def vector(self, dtype: torch.dtype, *strides: int) -> int:
        """What divides every step from one row to another; see `vector`."""
        return vector(dtype, self.N, self.width, self.row_stride, self.plane_stride, *strides)

    @property
    def shared(self) -> tuple[int, int, int]:
        """Programs that share each channel, channels, and groups of them: see workspace_of."""
        channels = self.width if self.index == COLUMN.value else self.planes
        return self.splits, channels, self.groups

    def index_of(self, elements: int) -> int:
        return self.index if elements > 1 else ONE.value

    @property
    def arguments(self) -> dict[str, int]:
        """What every tiled kernel takes."""
        return {
            "rows": self.rows,
            "width": self.width,
            "row_stride": self.row_stride,
            "plane_stride": self.plane_stride,
            "col_blocks": self.col_blocks,
            "ROWS": self.rows_per_tile,
            "COLS": self.cols_per_tile,
        }

    @property
    def summing(self) -> dict[str, int]:
        """What one that sums takes as well."""
        return {"groups": self.groups, "tiles": self.tiles, "splits": self.splits}


def vector(dtype: torch.dtype, *sizes: int) -> int:
    """The largest power of two that divides every size, up to one access of 16 bytes."""
    most = 16 // dtype.itemsize
    return next(v for v in (8, 4, 2, 1) if v <= most and all(n % v == 0 for n in sizes))


def tile(
    shape: Sequence[int], strides: Sequence[int], channels: int, block: int, most: int = 0
) -> Tiling:
    """Tiles of `block` neurons for x [T, *neurons] with parameters of `channels` elements.

    most: programs of a pass that sums; 0 for one that does not. One ends by handing over its sums,
    which takes some microseconds, and so does each that takes its place: those that a GPU holds at
    once should do all the work.
    """
    neurons = math.prod(shape[1:])
    if channels == 1:
        return Tiling(1, 1, neurons, neurons, 0, 1, block, ONE.value, most)
    inner = strides[2]
    index = COLUMN.value if inner == 1 else PLANE.value
    if inner == 1:
        planes, width, row_stride, plane_stride = 1, channels, channels, 0
        cols = min(triton.next_power_of_2(width), _COLUMNS)
    else:
        planes, width, row_stride, plane_stride = channels, inner, channels * inner, inner
        cols = min(triton.next_power_of_2(width), block)
    rows = neurons // row_stride
    return Tiling(planes, rows, width, row_stride, plane_stride, block // cols, cols, index, most)


@triton.jit
def multiple(n, VEC: tl.constexpr):
    """n, 64 bits wide, in a form that tells the compiler that VEC divides it."""
    return tl.cast(n, tl.int64) // VEC * VEC


@triton.jit
def split(pid, col_blocks, row_blocks):
    """Program number, where each has one tile -> (plane, row block, column block)."""
    rest = pid // col_blocks
    return rest // row_blocks, rest % row_blocks, pid % col_blocks


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
def columns(col_block, COLS: tl.constexpr):
    """-> [1, COLS]"""
    return (tl.cast(col_block, tl.int64) * COLS + tl.arange(0, COLS))[None, :]


@triton.jit
def rows_of(row_block, ROWS: tl.constexpr):
    """-> [ROWS, 1]"""
    return (tl.cast(row_block, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]


@triton.jit
def is_whole(row_block, col_block, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """No neuron of this tile lies outside."""
    rows_end = (tl.cast(row_block, tl.int64) + 1) * ROWS
    return (rows_end <= rows) & ((tl.cast(col_block, tl.int64) + 1) * COLS <= width)


@triton.jit
def parameter(ptr, plane, cols, width, INDEX: tl.constexpr):
    """threshold or leak of a tile: a scalar, or [1, COLS]."""
    if INDEX == COLUMN:
        p = tl.load(ptr + cols, mask=cols < width, other=1.0)
    elif INDEX == PLANE:
        p = tl.load(ptr + plane)
    else:
        p = tl.load(ptr)
    return p
