"""CPU backend: the native kernels of sparse_conv2d, whose stores add the residual and activate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops import _cpu


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """What the native kernels take."""
    return _cpu.why_not(x, values)


def run(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    out_dtype: torch.dtype,
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    return _cpu.prepared_for(values, layout, geometry, x).run(x, bias, residual, act, out_dtype)
