"""Compact backend: a channel-pruned layer as the smaller dense convolution that it is, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._torch import compact_input_gradient, convolve_compact, dense_weight_gradient


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """Channel weights only."""
    return None if values.dim() == 4 else "it takes channel-pruned weights"


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
    K, C, R, S = weight_shape
    return convolve_compact(x, values, layout, bias, ConvGeometry(C, K, (R, S), stride, padding, dilation))


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
    """Both gradients of the smaller convolution, in their places."""
    K, C, R, S = weight_shape
    geometry = ConvGeometry(C, K, (R, S), stride, padding, dilation)
    grad_x, grad_values = x.new_empty(0), values.new_empty(0)
    if wants[0]:
        grad_x = compact_input_gradient(grad, x, values, layout, geometry)
    if wants[1]:
        grad_values = dense_weight_gradient(grad, x, values, layout, geometry)
    return grad_x, grad_values
