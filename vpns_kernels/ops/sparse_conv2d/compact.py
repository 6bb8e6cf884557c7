"""Compact backend: a channel-pruned layer as the smaller dense convolution that it is, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._torch import compact_input_gradient, compact_weight_gradient, convolve_compact


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
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation)
    return convolve_compact(x, values, layout, bias, geometry)


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
    """The smaller convolution's, among zeros."""
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation)
    return compact_input_gradient(grad, x, values, layout, geometry)


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
    """The smaller convolution's."""
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation)
    return compact_weight_gradient(grad, x, values, layout, geometry)
