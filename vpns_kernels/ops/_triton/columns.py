"""How is a matrix summed over its rows? In splits of rows, each in its order, and the splits in theirs.

A tile of BLOCK_M rows × BLOCK_C columns keeps one float32 sum per entry while it moves down the rows of its
split; what the splits leave is summed the same way. Every number is read once, and no sum depends on which
program was first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.launch import Launch

# Programs that fill the largest GPU, and tiles below which a program is not worth its start.
_PROGRAMS = 512
_TILES_PER_SPLIT = 16
_TILE = 2048


@dataclass(frozen=True)
class ColumnTiles:
    """Who reads what of [rows, columns]: tiles of block_m × block_c, `splits` groups of rows.

    A split has `rows_per_split` rows, a multiple of block_m, but for the last one.
    """

    block_m: int
    block_c: int
    splits: int
    rows_per_split: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c}


def pick_tiles(rows: int, columns: int, most_splits: int = _PROGRAMS) -> ColumnTiles:
    """Rows of 64 columns, a memory line or two, and as many splits as keep a GPU busy.

    Where the columns alone keep it busy, as those of a whole activation do, 512: longer runs of memory.
    """
    widest = 512 if columns >= 512 * _PROGRAMS else 64
    block_c = min(widest, max(16, triton.next_power_of_2(columns)))
    block_m = _TILE // block_c
    wanted = min(most_splits, -(-_PROGRAMS // max(1, triton.cdiv(columns, block_c))))
    tiles = triton.cdiv(rows, block_m)
    tiles_per_split = max(1, triton.cdiv(tiles, wanted), min(tiles, _TILES_PER_SPLIT))
    if most_splits == 1:
        tiles_per_split = max(1, tiles)
    splits = max(1, triton.cdiv(tiles, tiles_per_split))
    return ColumnTiles(block_m, block_c, splits, tiles_per_split * block_m, warps=8)


@triton.jit
def sum_rows_kernel(
    parts_ptr,  # [rows, columns]
    sums_ptr,  # [splits, columns], float32
    rows,
    columns,
    rows_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & (offs_c < columns)[None, :]
        part = tl.load(parts_ptr + offs_m[:, None] * columns + offs_c[None, :], mask=mask, other=0.0)
        acc += part.to(tl.float32)
    sums = tl.sum(acc, axis=0)
    tl.store(sums_ptr + split.to(tl.int64) * columns + offs_c, sums, mask=offs_c < columns)


def sum_rows(parts: Tensor) -> Tensor:
    """[columns] in float32: the sums over the first dimension of a contiguous [rows, columns]."""
    rows, columns = parts.shape
    tiles = pick_tiles(rows, columns)
    sums = _sum(parts, tiles)
    return sums[0] if tiles.splits == 1 else _sum(sums, pick_tiles(tiles.splits, columns, most_splits=1))[0]


def _sum(parts: Tensor, tiles: ColumnTiles) -> Tensor:
    rows, columns = parts.shape
    sums = torch.empty((tiles.splits, columns), dtype=torch.float32, device=parts.device)
    Launch(
        sum_rows_kernel,
        (triton.cdiv(columns, tiles.block_c), tiles.splits),
        {
            "parts_ptr": parts,
            "sums_ptr": sums,
            "rows": rows,
            "columns": columns,
            "rows_per_split": tiles.rows_per_split,
        },
        tiles.constants,
        warps=tiles.warps,
        stages=1,
    ).run()
    return sums
