"""The gradients of a channel-pruned layer, by torch: those of the smaller dense convolution that it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._torch.channels import take_channels


def compact_weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """The gradient of values [kept K, kept C, R, S], in their shape and dtype."""
    kept_out, kept_in = layout
    if values.numel() == 0:
        return torch.zeros_like(values)
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    found: Tensor
    _, found, _ = torch.ops.aten.convolution_backward(
        take_channels(grad, kept_out),
        take_channels(x, kept_in),
        x.new_empty(values.shape),
        None,
        *sizes,
        False,
        [0, 0],
        1,
        [False, True, False],
    )
    return found.to(values.dtype)


def compact_input_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """The gradient of x, in its shape and dtype, channels_last; zero at channels that are not kept."""
    kept_out, kept_in = layout
    grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
    if values.numel() == 0 or x.numel() == 0:
        return grad_x
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    smaller, _, _ = torch.ops.aten.convolution_backward(
        take_channels(grad, kept_out),
        take_channels(x, kept_in),
        values.to(x.dtype),
        None,
        *sizes,
        False,
        [0, 0],
        1,
        [True, False, False],
    )
    return grad_x.index_copy_(1, kept_in.long(), smaller)
