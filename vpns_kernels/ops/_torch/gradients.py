"""The gradient of kept weights by torch's dense kernel: where it wins, and where no other takes the layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.formats import pick
from vpns_kernels.geometry import ConvGeometry


def dense_weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """As values: of channel weights by the smaller convolution, of others by the whole one."""
    shape: Sequence[int] = geometry.weight_shape
    if values.dim() == 4:
        kept_out, kept_in = layout
        grad, x, shape = grad.index_select(1, kept_out), x.index_select(1, kept_in), values.shape
    weight = x.new_empty(shape)
    if weight.numel() == 0:
        return torch.zeros_like(values)
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    _, dense, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sizes, False, [0, 0], geometry.groups, [False, True, False]
    )
    picked = dense if values.dim() == 4 else pick(dense, values, layout, geometry)
    return picked.to(values.dtype)


def compact_input_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """Of channel weights: the smaller convolution's, among zeros; as x, channels_last."""
    kept_out, kept_in = layout
    grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
    if values.numel() == 0 or x.numel() == 0:
        return grad_x
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    smaller, _, _ = torch.ops.aten.convolution_backward(
        grad.index_select(1, kept_out),
        x.index_select(1, kept_in),
        values.to(x.dtype),
        None,
        *sizes,
        False,
        [0, 0],
        1,
        [True, False, False],
    )
    return grad_x.index_copy_(1, kept_in.long(), smaller)
