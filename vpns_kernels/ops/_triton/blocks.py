"""Which blocks does a weight keep, for the kernels? Of a packed weight once, of a mask at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vpns_kernels.formats import validate
from vpns_kernels.formats.block import places, sizes
from vpns_kernels.formats.layouts import LayoutCache
from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton import taps
from vpns_kernels.ops._triton.block_conv import BlockWeight
from vpns_kernels.ops._triton.block_lists import BlockLists, list_blocks
from vpns_kernels.ops._triton.launch import ALIGNMENT_BYTES, aligned
from vpns_kernels.ops._triton.taps import list_taps, pack_tap

_SIDES = (16, 32, 64)
_MOST_BLOCKS = 1 << 16


def why_not(block: Pair, geometry: ConvGeometry, dtype: torch.dtype) -> str | None:
    """What the kernels of blocks take."""
    if any(side not in _SIDES for side in block):
        return f"it takes blocks with sides of {', '.join(map(str, _SIDES))}, got {block[0]}x{block[1]}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    if max(geometry.out_channels // block[0], geometry.in_channels // block[1]) >= _MOST_BLOCKS:
        return f"it takes fewer than {_MOST_BLOCKS} blocks along a side"
    return taps.why_not(geometry)


@dataclass(frozen=True)
class PackedBlocks:
    """The places of a packed weight's blocks, for all passes; made once for a layout.

    Args:
        table: int32 [K blocks, C blocks, R · S]; a block's number, or -1.
    """

    table: Tensor
    geometry: ConvGeometry

    @cached_property
    def forward(self) -> BlockLists:
        """The lists of the forward pass."""
        return list_blocks(self.table, self.geometry, is_input_gradient=False).longest_first()

    @cached_property
    def backward(self) -> BlockLists:
        """The lists of the input's gradient."""
        return list_blocks(self.table, self.geometry, is_input_gradient=True).longest_first()

    @cached_property
    def gradients(self) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """(entries of the weight's gradient by class, how many of each class, the places to put them)."""
        found: list[Tensor] = []
        counts: list[int] = []
        numbers: list[Tensor] = []
        table = self.table.cpu()
        for members in list_taps(self.geometry):
            counts.append(0)
            for tap in members:
                k, c = (table[..., tap.index] >= 0).nonzero(as_tuple=True)
                found.append(pack_tap(tap, 1) & 0xFFFF | c << 16 | k << 32)
                numbers.append(table[k, c, tap.index])
                counts[-1] += len(k)
        device = self.table.device
        # Where each block's gradient stands among the entries.
        order = torch.cat(numbers).argsort()
        return torch.cat(found).to(device), tuple(counts), order.to(device)


_packed: LayoutCache[PackedBlocks] = LayoutCache()


def packed_blocks(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> PackedBlocks:
    """The lists of packed values [count, bk, bc]; a layout is checked when first seen or changed.

    Raises:
        ValueError: a layout that does not describe the weight.
    """

    def make() -> PackedBlocks:
        arrays = [array.cpu() for array in layout]
        validate(values.cpu(), arrays, geometry)
        found = sizes(geometry, *values.shape[1:])
        table = torch.full((found.rows * found.channels * found.taps,), -1, dtype=torch.int32)
        table[places(arrays, found)] = torch.arange(len(values), dtype=torch.int32)
        shape = (found.rows, found.channels, found.taps)
        return PackedBlocks(table.view(shape).to(values.device), geometry)

    return _packed.get(layout, (geometry, tuple(values.shape), values.device), make)


def packed_weight(values: Tensor, dtype: torch.dtype) -> BlockWeight:
    """Values [count, bk, bc] as the kernels take them, in the dtype of the products."""
    _, bk, bc = values.shape
    # A descriptor has no empty axis; no list names the block that stands in.
    found = values.detach().to(dtype) if len(values) else values.new_zeros((1, bk, bc), dtype=dtype)
    return BlockWeight(aligned(found.contiguous()), (bk, bc), is_packed=True)


def dense_blocks(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, R, S] → [R · S, K, C'], of which a tap's blocks are boxes; C' fills 16 bytes."""
    K, C, R, S = weight.shape
    unit = ALIGNMENT_BYTES // dtype.itemsize
    blocks = weight.detach().permute(2, 3, 0, 1).reshape(R * S, K, C)
    if C % unit:
        blocks = torch.nn.functional.pad(blocks, (0, -C % unit))
    return aligned(blocks.to(dtype).contiguous())
