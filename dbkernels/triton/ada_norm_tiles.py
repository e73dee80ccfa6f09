"""Partition the modulated norms' work: tiles of rows, and programs of tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dbkernels._dtypes import compute_dtype

PROCESSORS = 132  # of an H100 or H200; fixed, since sums must not depend on the device at hand
REGISTERS = 65536  # of one of them, for all its threads
WIDEST = 256  # lanes; the backward pass of a wider row doesn't fit into registers


class Tile(NamedTuple):
    """Rows that a program processes together, in `chunks` pieces of `columns`; lanes: threads per row."""

    rows: int
    chunks: int
    columns: int
    lanes: int
    warps: int

    def constants(self) -> dict[str, int]:
        """Return the constants by the kernels' names."""
        return dict(ROWS=self.rows, CHUNKS=self.chunks, COLUMNS=self.columns, num_warps=self.warps)


def _tile(dim: int, inner: int, dtype: torch.dtype, each: int, warps: int) -> Tile:
    """Return a tile with `each` float32 numbers of a row per thread, in pieces of 16 bytes if dim allows it.

    It has `warps` warps: fewer where a sample has few rows, more where a row needs them.
    """
    most = triton.next_power_of_2(inner)  # rows
    unit = min(16 // dtype.itemsize, dim & -dim)
    lanes = triton.next_power_of_2(triton.cdiv(dim, each * 4 // compute_dtype(dtype).itemsize))
    while warps > 1 and warps * 32 // lanes > most:
        warps //= 2
    while lanes < 32 and warps * 32 // lanes > most and lanes * unit < dim:
        lanes *= 2
    warps = max(warps, lanes // 32)
    columns = lanes * unit
    return Tile(warps * 32 // lanes, triton.next_power_of_2(triton.cdiv(dim, columns)), columns, lanes, warps)


def forward_tile(dim: int, inner: int, dtype: torch.dtype) -> Tile:
    """Return the forward kernel's tile: a warp holds a row of up to 1024 elements."""
    tile = _tile(dim, inner, dtype, each=32, warps=4)
    # 512 lanes may have 128 registers each; 1024 that hold half as much get by with 64
    return tile if tile.lanes != 512 else _tile(dim, inner, dtype, each=16, warps=4)


def forward_programs(samples: int, inner: int, tile: Tile) -> tuple[int, int]:
    """Return steps per program and programs per sample: up to four steps if every processor gets eight programs.
    A row of 512 lanes or more leaves no registers for the next one."""
    steps = 4 if tile.lanes < 512 else 1
    while steps > 1 and samples * triton.cdiv(inner, steps * tile.rows) < 8 * PROCESSORS:
        steps //= 2
    return steps, triton.cdiv(inner, steps * tile.rows)


def backward_tile(dim: int, inner: int, dtype: torch.dtype, gated: bool) -> tuple[Tile, int]:
    """Return the backward kernel's tile and the registers per thread: half of the forward's elements, since two or
    three running sums lie beside a row and the next one."""
    tile = _tile(dim, inner, dtype, each=16, warps=4 if gated or dtype.itemsize > 2 else 8)
    return tile, 255 if gated else 128 if dtype.itemsize == 2 else 168


def backward_programs(samples: int, inner: int, tile: Tile, registers: int) -> tuple[int, int]:
    """Return steps per program and programs per sample.

    As many programs run at a time as their registers allow; such a slot runs one after another, each for its steps and
    about two more: to begin, and to write its sums, which are read again. The least time wins: mostly all slots filled
    once.
    """
    slots = PROCESSORS * max(1, REGISTERS // (registers * 32 * tile.warps))

    def time(tiles: int) -> int:
        return triton.cdiv(samples * tiles, slots) * (triton.cdiv(inner, tiles * tile.rows) + 2)

    most = min(triton.cdiv(inner, tile.rows), max(1, 4 * slots // samples))
    steps = triton.cdiv(inner, min(range(1, most + 1), key=time) * tile.rows)
    return steps, triton.cdiv(inner, steps * tile.rows)


def wide_programs(samples: int, inner: int) -> tuple[int, int]:
    """Return rows per program and programs per sample, for the sums of rows that are too wide: programs are many, as
    each takes few columns."""
    rows = 1
    while rows < 64 and samples * triton.cdiv(inner, 2 * rows) >= PROCESSORS:
        rows *= 2
    return rows, triton.cdiv(inner, rows)
