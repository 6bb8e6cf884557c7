"""The truth: unpack to a dense weight, convolve with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from vpns_kernels.formats import pick, unpack
from vpns_kernels.geometry import ConvGeometry, Pair


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """The reference takes everything that torch convolves."""
    return None


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
    weight = _dense(values, layout, weight_shape, groups).to(x.dtype)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last)


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
    """The input gradient of torch's dense convolution, in the shape of x, channels_last."""
    weight = _dense(values, layout, weight_shape, groups).to(x.dtype)
    found: Tensor = conv2d_input(x.shape, weight, grad, stride, padding, dilation, groups)
    return found.contiguous(memory_format=torch.channels_last)


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
    """What stands at the kept places of the dense weight's gradient; as values."""
    dense = conv2d_weight(x, tuple(weight_shape), grad, stride, padding, dilation, groups)
    geometry = ConvGeometry.from_weight(weight_shape, groups=groups)
    return pick(dense, values, layout, geometry).to(values.dtype)


def _dense(values: Tensor, layout: Sequence[Tensor], weight_shape: Sequence[int], groups: int) -> Tensor:
    return unpack(values, layout, ConvGeometry.from_weight(weight_shape, groups=groups))
