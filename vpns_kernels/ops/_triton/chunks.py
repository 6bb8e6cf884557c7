"""How does one start serve tensors of many sizes? By a table on the device of the chunks they fall into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Numbers that a program reads in all and at once, and its warps."""

    chunk: int
    tile: int
    warps: int


def pick_tiles() -> Tiles:
    """Sixteen numbers a thread; chunks small enough that the last ones leave few multiprocessors idle."""
    return Tiles(chunk=32768, tile=8192, warps=16)


def chunk_table(tensors: Sequence[Tensor], chunk: int) -> Tensor:
    """Address and length of each chunk and its place in all, int64 [chunks, 3], where the tensors are.

    Args:
        tensors: contiguous; they must outlive what reads the table.
    """
    sizes = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    return _chunk_table(sizes, tensors[0].element_size(), chunk, tensors[0].device)


@lru_cache(maxsize=16)
def _chunk_table(sizes: tuple[tuple[int, int], ...], size: int, chunk: int, device: torch.device) -> Tensor:
    """Kept, because scores stay where they are from step to step; it holds nothing but these numbers."""
    rows, place = [], 0
    for address, length in sizes:
        for start in range(0, length, chunk):
            rows.append((address + start * size, min(chunk, length - start), place + start))
        place += length
    # From pinned memory the copy is one more item in the stream's queue.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
