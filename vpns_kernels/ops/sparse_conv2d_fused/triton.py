"""Triton backend: the kernels of sparse_conv2d, whose stores add, activate and round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton import packed
from vpns_kernels.ops._triton.epilogue import Epilogue
from vpns_kernels.ops._triton.rows import empty_activation


def why_not(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: object,
) -> str | None:
    """Blocks of 16 to 64 channels a side or whole channels, strides of 1 and 2, no groups."""
    *sizes, _, _ = rest
    return packed.why_not(x, values, sizes)


def prepare(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values, lying as `run` reads them for inputs of this type without a copy."""
    return packed.prepare(values, dtype)


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
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, out_dtype, x.device)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    packed.convolve(x, values, layout, geometry, y, Epilogue(bias, residual, act))
    return y
