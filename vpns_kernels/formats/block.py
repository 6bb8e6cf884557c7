"""Block format: kept blocks [bk, bc] of one tap each, by rows of blocks; zeros beyond ragged edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.formats.base import LayoutSizes, build_layout, check_layout, entry_rows
from vpns_kernels.geometry import ConvGeometry


def sizes(geometry: ConvGeometry, bk: int, bc: int) -> LayoutSizes:
    """The sizes of a layout of blocks of bk output and bc input channels.

    Raises:
        ValueError: blocks of less than 1x1.
        NotImplementedError: groups whose filters bk does not divide.
    """
    K, C, R, S = geometry.weight_shape
    filters = K // geometry.groups
    if bk < 1 or bc < 1:
        raise ValueError(f"layout: expected blocks of at least 1x1, got {bk}x{bc}")
    if geometry.groups > 1 and filters % bk:
        raise NotImplementedError(
            f"block format: expected bk to divide a group's {filters} filters, got {bk} (use unstructured)"
        )
    return LayoutSizes(-(-filters // bk), -(-C // bc), R * S, geometry.groups)


def pack(
    weight: Tensor, mask: Tensor, geometry: ConvGeometry, bk: int, bc: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(values [count, bk, bc], layout) of the blocks with anything kept; masked weights in them are 0."""
    found = sizes(geometry, bk, bc)
    blocks = _as_blocks(weight * mask, found, bk, bc)  # [rows, channels, taps, bk, bc]
    rows, channels, taps = _as_blocks(mask, found, bk, bc).flatten(3).any(-1).nonzero(as_tuple=True)
    return blocks[rows, channels, taps].contiguous(), build_layout(rows, channels, taps, found)


def unpack(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """The dense weight [K, C / groups, R, S]; differentiable in values."""
    K, C, R, S = geometry.weight_shape
    found = sizes(geometry, *values.shape[1:])
    shape = (found.rows * found.channels_per_group * found.taps, *values.shape[1:])
    blocks = values.new_zeros(shape).index_put((places(layout, found),), values)
    dense = blocks.view(found.rows, found.channels_per_group, R, S, *values.shape[1:]).permute(
        0, 4, 1, 5, 2, 3
    )
    return dense.reshape(found.rows * values.shape[1], -1, R, S)[:K, :C]


def pick(dense: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """[count, bk, bc] entries of a dense tensor, in the order of the values."""
    bk, bc = values.shape[1:]
    found = sizes(geometry, bk, bc)
    return _as_blocks(dense, found, bk, bc).flatten(0, 2)[places(layout, found)]


def places(layout: Sequence[Tensor], found: LayoutSizes) -> Tensor:
    """Flat place of each block among all blocks, int64 [count]."""
    rows = entry_rows(layout[0], layout[1].numel())
    return rows * (found.channels_per_group * found.taps) + layout[1].long()


def validate(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> None:
    """ValueError where the arrays do not describe a weight of this geometry."""
    check_layout(tuple(layout), values.shape[0], sizes(geometry, *values.shape[1:]))


def _as_blocks(dense: Tensor, found: LayoutSizes, bk: int, bc: int) -> Tensor:
    K, C, R, S = dense.shape
    padded = F.pad(dense, (0, 0, 0, 0, 0, found.channels_per_group * bc - C, 0, found.rows * bk - K))
    return padded.view(found.rows, bk, found.channels_per_group, bc, R * S).permute(0, 2, 4, 1, 3)
