"""Triton backend: masks of this step, listed on the device; no host waits for how many channels they keep.

The kernel is that of packed channels (ops/_triton/channel_conv.py), which gathers what it reads by a list
and loads its length. Forward it reads the kept inputs, for the input's gradient the kept outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton import channel_conv, channel_lists
from vpns_kernels.ops._triton.channel_lists import all_channels, listed_filters, masked_channels
from vpns_kernels.ops._triton.epilogue import Epilogue
from vpns_kernels.ops._triton.rows import empty_activation
from vpns_kernels.ops.kept_conv2d import reference


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_mask: Tensor,
    output_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> str | None:
    """Strides of 1 and 2, no groups."""
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    return channel_lists.why_not(geometry, x.dtype)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_mask: Tensor,
    output_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, x.dtype, x.device)
    inputs, outputs = masked_channels(input_mask), all_channels(geometry.out_channels, x.device)
    filters = listed_filters(weight, 1, inputs, x.dtype)
    channel_conv.convolve(x, filters, inputs, outputs, geometry, y, Epilogue(bias))
    return y


def run_input_gradient(
    grad: Tensor,
    weight: Tensor,
    output_mask: Tensor | None,
    x_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """[N, C, H, W] in the dtype of grad, channels_last; of all outputs it is torch's."""
    if output_mask is None:
        return reference.run_input_gradient(
            grad, weight, output_mask, x_shape, stride, padding, dilation, groups
        )
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    N, C, H, W = x_shape
    grad_x = empty_activation((N, C, H, W), grad.dtype, grad.device)
    inputs, outputs = all_channels(geometry.in_channels, grad.device), masked_channels(output_mask)
    filters = listed_filters(weight, 0, outputs, grad.dtype)
    channel_conv.input_gradient(grad, filters, inputs, outputs, geometry, grad_x)
    return grad_x
