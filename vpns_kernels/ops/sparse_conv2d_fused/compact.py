"""Compact backend: a channel-pruned layer as the smaller dense convolution that it is, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._torch import convolve_compact, finish, sum_dtype


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """Channel weights only."""
    return None if values.dim() == 4 else "it takes channel-pruned weights"


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
    # torch's convolution rounds to the type of its input: a residual after that would be a second rounding.
    is_last = residual is None and out_dtype == x.dtype
    wide = x if is_last else x.to(sum_dtype(x.dtype))
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation)
    return finish(convolve_compact(wide, values, layout, bias, geometry), residual, act, out_dtype)
