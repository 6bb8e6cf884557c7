"""Triton backend: block weights by the kernels of ops/_triton/block_conv.py and block_gradients.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton import block_conv, blocks
from vpns_kernels.ops._triton.block_gradients import weight_gradient
from vpns_kernels.ops._triton.rows import empty_activation


def why_not(
    x: Tensor, values: Tensor, layout: Sequence[Tensor], bias: Tensor | None, *sizes: object
) -> str | None:
    """Blocks of 16 to 64 channels a side, strides of 1 and 2, no groups."""
    return blocks.why_not_packed(x, values, sizes)


def run(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    geometry = blocks.build_geometry(weight_shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, x.dtype, x.device)
    found = blocks.packed_blocks(values, layout, geometry)
    weight = blocks.packed_weight(values, x.dtype)
    block_conv.convolve(x, weight, found.forward, geometry, y, block_conv.Epilogue(bias))
    return y


def run_input_gradient(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """As x, channels_last: the same kernel with the transposed weight."""
    geometry = blocks.build_geometry(weight_shape, stride, padding, dilation, groups)
    grad_x = empty_activation(tuple(x.shape), x.dtype, x.device)
    found = blocks.packed_blocks(values, layout, geometry)
    weight = blocks.packed_weight(values, x.dtype)
    block_conv.input_gradient(grad, weight, found.backward, geometry, grad_x)
    return grad_x


def run_weight_gradient(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """As values: of kept blocks only, summed in float32."""
    geometry = blocks.build_geometry(weight_shape, stride, padding, dilation, groups)
    entries, counts, order = blocks.packed_blocks(values, layout, geometry).gradients
    bk, bc = values.shape[1:]
    sums = weight_gradient(grad, x, entries, counts, (bk, bc), geometry)
    return sums.index_select(0, order).to(values.dtype)
