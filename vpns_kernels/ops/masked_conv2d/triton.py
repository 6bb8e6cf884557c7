"""Triton backend: block masks of this step, listed on the device; the weight is read where it lies.

The kernels are those of packed weights, ops/_triton/block_conv.py: a kept block is a box of a dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton import block_conv, blocks
from vpns_kernels.ops._triton.block_gradients import score_sums
from vpns_kernels.ops._triton.block_lists import list_blocks
from vpns_kernels.ops._triton.rows import empty_activation
from vpns_kernels.patterns import Block, parse_pattern


def why_not(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> str | None:
    """Masks of blocks of 16 to 64 channels a side, strides of 1 and 2, no groups."""
    kind = parse_pattern(pattern)
    if not isinstance(kind, Block):
        return f"it takes masks of blocks, got {kind.spec} (dense products serve it: reference)"
    if weight.dtype == torch.float64:
        return "it takes weights of at most float32"
    geometry = blocks.build_geometry(weight.shape, stride, padding, dilation, groups)
    return blocks.why_not((kind.bk, kind.bc), geometry, x.dtype)


def run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    geometry = blocks.build_geometry(weight.shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, x.dtype, x.device)
    lists = list_blocks(mask.flatten(2).contiguous(), geometry, is_input_gradient=False)
    epilogue = block_conv.Epilogue(bias)
    block_conv.convolve(x, _weight(weight, pattern, x.dtype), lists, geometry, y, epilogue)
    return y


def run_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """As x, channels_last: the same kernel with the transposed weight."""
    geometry = blocks.build_geometry(weight.shape, stride, padding, dilation, groups)
    grad_x = empty_activation(tuple(x.shape), x.dtype, x.device)
    lists = list_blocks(mask.flatten(2).contiguous(), geometry, is_input_gradient=True)
    block_conv.input_gradient(grad, _weight(weight, pattern, x.dtype), lists, geometry, grad_x)
    return grad_x


def run_score_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """sign(S) · Σ_block W · dW, as scores; the dense dW is never written."""
    geometry = blocks.build_geometry(weight.shape, stride, padding, dilation, groups)
    sums = score_sums(grad, x, weight.detach(), _block(pattern), geometry)
    return (scores.detach().sign() * sums).to(scores.dtype)


def _weight(weight: Tensor, pattern: str, dtype: torch.dtype) -> block_conv.BlockWeight:
    return block_conv.BlockWeight(blocks.dense_blocks(weight, dtype), _block(pattern), is_packed=False)


def _block(pattern: str) -> Pair:
    kind = parse_pattern(pattern)
    assert isinstance(kind, Block)
    return kind.bk, kind.bc
