"""Which blocks does an output block sum over? A list of those kept, written on the device from a table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.launch import Launch
from vpns_kernels.ops._triton.taps import tap_table

_BLOCK = 128


@dataclass(frozen=True)
class BlockLists:
    """The entries of every output block, classes of taps one after the other.

    Args:
        order: int32 [output blocks], in which programs take them.
        starts: int32 [output blocks, classes + 1], in that order; where the classes of an output block begin,
            and end.
        entries: int64; from the lowest byte: shift of rows + 128, shift of columns + 128, two bytes of the
            input block, four of the number by which the kernel finds the block's weights.
    """

    order: Tensor
    starts: Tensor
    entries: Tensor

    def longest_first(self) -> BlockLists:
        """The same, output blocks with the most entries first: what is left at the end is short."""
        lengths = self.starts[:, -1] - self.starts[:, 0]
        order = lengths.argsort(descending=True, stable=True)
        return BlockLists(self.order[order], self.starts[order].contiguous(), self.entries)


def list_blocks(table: Tensor, geometry: ConvGeometry, is_input_gradient: bool) -> BlockLists:
    """The lists of a weight, for the forward pass or for the input's gradient; nothing waits for the host.

    Args:
        table: [K blocks, C blocks, R · S], contiguous. bool: True = kept, and a block's number is its tap;
            int32: its number, or -1 where it is masked.
    """
    blocks_k, blocks_c, taps = table.shape
    is_mask = table.dtype == torch.bool
    outer, inner = (blocks_c, blocks_k) if is_input_gradient else (blocks_k, blocks_c)
    strides = (taps, blocks_c * taps) if is_input_gradient else (blocks_c * taps, taps)
    packed, ends = tap_table(geometry, -1 if is_input_gradient else 1, table.device)
    classes = ends.numel()
    starts = torch.empty(outer, classes + 1, dtype=torch.int32, device=table.device)
    # The kernel that reads them loads one ahead of what it uses.
    entries = torch.empty(outer * inner * taps + 1, dtype=torch.int64, device=table.device)
    args = {
        "table_ptr": table.view(torch.uint8) if is_mask else table,
        "taps_ptr": packed,
        "ends_ptr": ends,
        "starts_ptr": starts,
        "entries_ptr": entries,
        "inner": inner,
        "stride_outer": strides[0],
        "stride_inner": strides[1],
        "capacity": inner * taps,
    }
    constants = {"IS_MASK": is_mask, "CLASSES": classes, "BLOCK": _BLOCK}
    Launch(_list_kernel, (outer,), args, constants, warps=4, stages=1).run()
    return BlockLists(_count_up(outer, table.device), starts, entries)


@lru_cache(maxsize=1024)
def _count_up(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@triton.jit
def _list_kernel(
    table_ptr,
    taps_ptr,
    ends_ptr,
    starts_ptr,
    entries_ptr,
    inner,
    stride_outer,
    stride_inner,
    capacity,
    IS_MASK: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program lists one output block: a running count, and a prefix sum over BLOCK places at a time."""
    outer = tl.program_id(0)
    place = outer.to(tl.int64) * capacity
    first = 0
    for cls in range(CLASSES):
        tl.store(starts_ptr + outer * (CLASSES + 1) + cls, place.to(tl.int32))
        last = tl.load(ends_ptr + cls) * inner
        for begin in range(first, last, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            mask = offs < last
            tap = tl.load(taps_ptr + offs // inner, mask=mask, other=0)
            block = offs % inner
            offs_table = outer.to(tl.int64) * stride_outer + block * stride_inner + (tap >> 16)
            if IS_MASK:
                value = tap >> 16
                kept = tl.load(table_ptr + offs_table, mask=mask, other=0).to(tl.int32)
            else:
                value = tl.load(table_ptr + offs_table, mask=mask, other=-1)
                kept = (value >= 0).to(tl.int32)
            entry = (tap & 0xFFFF).to(tl.int64) | block.to(tl.int64) << 16 | value.to(tl.int64) << 32
            tl.store(entries_ptr + place + tl.cumsum(kept, 0) - 1, entry, mask=kept > 0)
            place += tl.sum(kept, 0)
        first = last
    tl.store(starts_ptr + outer * (CLASSES + 1) + CLASSES, place.to(tl.int32))
