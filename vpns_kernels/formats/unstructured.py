"""Unstructured format: kept weights one by one, rows of output channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.formats.base import LayoutSizes, build_layout, check_layout, entry_rows
from vpns_kernels.geometry import ConvGeometry


def sizes(geometry: ConvGeometry) -> LayoutSizes:
    """The sizes of a layout of single weights."""
    K, C, R, S = geometry.weight_shape
    return LayoutSizes(K // geometry.groups, C, R * S, geometry.groups)


def pack(weight: Tensor, mask: Tensor, geometry: ConvGeometry) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(values [count], layout) of the weights where the mask is True."""
    found = sizes(geometry)
    rows, flat = mask.flatten(1).nonzero(as_tuple=True)
    values = weight.flatten(1)[rows, flat]
    return values, build_layout(rows, flat // found.taps, flat % found.taps, found)


def unpack(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """The dense weight [K, C / groups, R, S]; differentiable in values."""
    K, C, R, S = geometry.weight_shape
    return values.new_zeros(K * C * R * S).index_put((places(layout, geometry),), values).view(K, C, R, S)


def pick(dense: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """[count] entries of a dense tensor, in the order of the values."""
    return dense.contiguous().view(-1)[places(layout, geometry)]


def places(layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """Flat place of each value in the dense weight, int64 [count]."""
    _, C, R, S = geometry.weight_shape
    rows = entry_rows(layout[0], layout[1].numel())
    return rows * (C * R * S) + layout[1].long()


def validate(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> None:
    """ValueError where the arrays do not describe a weight of this geometry."""
    check_layout(tuple(layout), values.shape[0], sizes(geometry))
