"""CPU backend: csrc/cpu/sparse_conv2d_*.cpp, one kernel per format and instruction set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops import _cpu


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """What the native kernels take."""
    return _cpu.why_not(x, values)


def why_no_weight_gradient(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """What the native kernels of weight gradients take."""
    return _cpu.why_no_weight_gradient(x, values)


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
    return _cpu.prepared_for(values, layout, geometry, x).run(x, bias)


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
    """The gradient of x, channels_last, by the forward kernels with the transposed weight."""
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    return _cpu.input_gradient(grad, x.shape, values.contiguous(), layout, geometry)


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
    return _cpu.weight_gradient(grad, x, values.contiguous(), layout, geometry).to(values.dtype)
