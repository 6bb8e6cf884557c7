"""CPU backend: csrc/cpu/sparse_conv2d_*.cpp, one kernel per format and instruction set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops import _cpu
from vpns_kernels.ops._torch import dense_weight_gradient


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """What the native kernels take."""
    return _cpu.why_not(x, values)


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
    geometry = ConvGeometry(C * groups, K, (R, S), stride, padding, dilation, groups)
    return _cpu.prepared_for(values, layout, geometry, x).run(x, bias)


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
    """Of x by the forward kernels; of kept blocks by their own, of other values by torch's dense kernel."""
    K, C, R, S = weight_shape
    geometry = ConvGeometry(C * groups, K, (R, S), stride, padding, dilation, groups)
    grad = grad.to(x.dtype)
    grad_x, grad_values = x.new_empty(0), values.new_empty(0)
    if wants[0]:
        grad_x = _cpu.input_gradient(grad, x.shape, values.contiguous(), layout, geometry)
    if wants[1] and _cpu.why_no_weight_gradient(x, values) is None:
        grad_values = _cpu.weight_gradient(grad, x, values.contiguous(), layout, geometry).to(values.dtype)
    elif wants[1]:
        grad_values = dense_weight_gradient(grad, x, values, layout, geometry)
    return grad_x, grad_values
