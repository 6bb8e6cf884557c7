"""The truth: torch's convolution and its input's gradient; zeros are multiplied as any number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from vpns_kernels.geometry import Pair


def why_not(x: Tensor, *rest: object) -> str | None:
    """The reference takes everything that torch convolves."""
    return None


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
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last)


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
    """[N, C, H, W] in the dtype of grad, channels_last."""
    weight = weight.to(grad.dtype).contiguous(memory_format=torch.channels_last)
    grad_x: Tensor = conv2d_input(x_shape, weight, grad, stride, padding, dilation, groups)
    return grad_x.contiguous(memory_format=torch.channels_last)
