"""The truth: unpack to a dense weight, convolve with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.formats import unpack
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


def run_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the kept values, each empty where it is not wanted."""
    with torch.enable_grad():
        leaf_x, leaf_values = x.detach().requires_grad_(), values.detach().requires_grad_()
        weight = _dense(leaf_values, layout, weight_shape, groups).to(x.dtype)
        y = F.conv2d(leaf_x, weight, None, stride, padding, dilation, groups)
    grad_x, grad_values = x.new_empty(0), values.new_empty(0)
    if wants[0]:
        (found,) = torch.autograd.grad(y, leaf_x, grad, retain_graph=True)
        grad_x = found.contiguous(memory_format=torch.channels_last)
    if wants[1]:
        (grad_values,) = torch.autograd.grad(y, leaf_values, grad)
    return grad_x, grad_values


def _dense(values: Tensor, layout: Sequence[Tensor], weight_shape: Sequence[int], groups: int) -> Tensor:
    K, C, R, S = weight_shape
    return unpack(values, layout, ConvGeometry(C * groups, K, (R, S), groups=groups))
