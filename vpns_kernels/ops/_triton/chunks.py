"""How does one start serve tensors of many sizes? By a table on the device of the chunks they fall into.

Another table has a sample of their entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Multiples of it, without their whole parts, fill the unit evenly.
_GOLDEN = 0.6180339887498949


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
    return _to_device(torch.tensor(rows, dtype=torch.int64), device)


def sample_table(tensors: Sequence[Tensor], count: int) -> Tensor:
    """Addresses of `count` entries, int64 [count], where the tensors are: of as many equal shares of all
    entries one each, now here and now there in it, so that no step through a tensor's axes is followed.

    Args:
        tensors: contiguous; they must outlive what reads the table.
    """
    sizes = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    return _sample_table(sizes, tensors[0].element_size(), count, tensors[0].device)


@lru_cache(maxsize=16)
def _sample_table(sizes: tuple[tuple[int, int], ...], size: int, count: int, device: torch.device) -> Tensor:
    addresses, lengths = (torch.tensor(column, dtype=torch.int64) for column in zip(*sizes, strict=True))
    ends = lengths.cumsum(0)
    share = torch.arange(count, dtype=torch.float64)
    places = ((share + share * _GOLDEN % 1) * (int(ends[-1]) / count)).to(torch.int64)
    places = places.clamp(max=int(ends[-1]) - 1)
    owners = torch.searchsorted(ends, places, right=True)
    return _to_device(addresses[owners] + (places - (ends - lengths)[owners]) * size, device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """From pinned memory the copy is one more item in the stream's queue."""
    pinned = table.pin_memory() if device.type == "cuda" else table
    return pinned.to(device, non_blocking=True)
