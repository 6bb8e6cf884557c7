"""Triton backend: block weights by ops/_triton/block_conv.py, whose stores add, activate and round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton import block_conv, blocks
from vpns_kernels.ops._triton.rows import empty_activation


def why_not(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: object,
) -> str | None:
    """Blocks of 16 to 64 channels a side, strides of 1 and 2, no groups."""
    *sizes, _, _ = rest
    return blocks.why_not_packed(x, values, sizes)


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
    geometry = blocks.build_geometry(weight_shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, out_dtype, x.device)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    found = blocks.packed_blocks(values, layout, geometry)
    weight = blocks.packed_weight(values, x.dtype)
    epilogue = block_conv.Epilogue(bias, residual, act)
    block_conv.convolve(x, weight, found.forward, geometry, y, epilogue)
    return y
