"""Which kernels take a packed weight? Those of its format: of blocks, or of whole channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton import block_conv, block_gradients, blocks, channel_conv, channel_lists
from vpns_kernels.ops._triton.channel_gradients import weight_gradient as channel_gradient
from vpns_kernels.ops._triton.epilogue import Epilogue


def why_not(x: Tensor, values: Tensor, sizes: Sequence[Any]) -> str | None:
    """What the kernels take of a packed weight; sizes as the schemas have them."""
    geometry, dtype = ConvGeometry.from_weight(*sizes), torch.promote_types(x.dtype, values.dtype)
    if values.dim() == 3:
        bk, bc = values.shape[1:]
        return blocks.why_not((bk, bc), geometry, dtype)
    return channel_lists.why_not(geometry, dtype) if _is_channel(values) else "it takes blocks and channels"


def prepare(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values, lying as `convolve` reads them for inputs of this type without a copy."""
    if _is_channel(values):
        return channel_lists.packed_filters(values, dtype)
    return values.to(dtype).contiguous()


def convolve(
    x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, y: Tensor, epilogue: Epilogue
) -> None:
    """Write y [N, K, P, Q], channels_last; products are taken in the dtype of x."""
    if _is_channel(values):
        found = channel_lists.packed_channels(values, layout, geometry)
        weight = channel_lists.filters(values, x.dtype)
        channel_conv.convolve(x, weight, found.inputs, found.outputs, geometry, y, epilogue)
    else:
        lists = blocks.packed_blocks(values, layout, geometry).forward
        block_conv.convolve(x, blocks.packed_weight(values, x.dtype), lists, geometry, y, epilogue)


def input_gradient(
    grad: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, grad_x: Tensor
) -> None:
    """Write grad_x [N, C, H, W], channels_last: the same kernel with the transposed weight."""
    if _is_channel(values):
        found = channel_lists.packed_channels(values, layout, geometry)
        weight = channel_lists.filters(values, grad.dtype)
        channel_conv.input_gradient(grad, weight, found.inputs, found.outputs, geometry, grad_x)
    else:
        lists = blocks.packed_blocks(values, layout, geometry).backward
        block_conv.input_gradient(grad, blocks.packed_weight(values, grad.dtype), lists, geometry, grad_x)


def weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """The gradient of what is kept alone, in the shape of values and in float32."""
    if _is_channel(values):
        found = channel_lists.packed_channels(values, layout, geometry)
        return channel_gradient(grad, x, found, geometry)
    entries, counts, order = blocks.packed_blocks(values, layout, geometry).gradients
    bk, bc = values.shape[1:]
    sums = block_gradients.weight_gradient(grad, x, entries, counts, (bk, bc), geometry)
    return sums.index_select(0, order)


def _is_channel(values: Tensor) -> bool:
    return values.dim() == 4
