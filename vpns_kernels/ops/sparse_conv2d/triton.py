"""Triton backend: weights of blocks and of channels, by the kernels that ops/_triton/packed.py names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton import packed
from vpns_kernels.ops._triton.epilogue import Epilogue
from vpns_kernels.ops._triton.rows import empty_activation


def why_not(
    x: Tensor, values: Tensor, layout: Sequence[Tensor], bias: Tensor | None, *sizes: object
) -> str | None:
    """Blocks of 16 to 64 channels a side or whole channels, strides of 1 and 2, no groups."""
    return packed.why_not(x, values, sizes)


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
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, x.dtype, x.device)
    packed.convolve(x, values, layout, geometry, y, Epilogue(bias))
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
    """The gradient of x, in its shape, channels_last: the same kernel with the transposed weight."""
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    grad_x = empty_activation(tuple(x.shape), x.dtype, x.device)
    packed.input_gradient(grad, values, layout, geometry, grad_x)
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
    """The gradient of what is kept alone, summed in float32, in the shape and dtype of values."""
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    return packed.weight_gradient(grad, x, values, layout, geometry).to(values.dtype)
