"""Triton backend: masks of blocks and of channels of this step, listed on the device; no host waits for them.

The kernels are those of packed weights: a kept block is a box of a dense weight (ops/_triton/block_conv.py),
and of channels the programs of those that are not kept end early (ops/_triton/channel_conv.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton import block_conv, blocks, channel_conv, channel_lists
from vpns_kernels.ops._triton.block_conv import BlockWeight
from vpns_kernels.ops._triton.block_gradients import score_sums
from vpns_kernels.ops._triton.block_lists import list_blocks
from vpns_kernels.ops._triton.channel_lists import all_channels, listed_filters, masked_channels
from vpns_kernels.ops._triton.epilogue import Epilogue
from vpns_kernels.ops._triton.rows import empty_activation
from vpns_kernels.patterns import Block, Channel, parse_pattern

# Input channels that scores of channels are summed over at a time.
_ROW = 128


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
    """Masks of blocks of 16 to 64 channels a side or of channels, strides of 1 and 2, no groups."""
    kind = parse_pattern(pattern)
    if not isinstance(kind, Block | Channel):
        return f"it takes masks of blocks and channels, got {kind.spec} (dense products serve it: reference)"
    if weight.dtype == torch.float64:
        return "it takes weights of at most float32"
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    if isinstance(kind, Block):
        return blocks.why_not((kind.bk, kind.bc), geometry, x.dtype)
    return channel_lists.why_not(geometry, x.dtype)


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
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    y = empty_activation(shape, x.dtype, x.device)
    block = _block(pattern)
    if block is None:
        outputs, inputs = masked_channels(mask), all_channels(geometry.in_channels, x.device)
        kept = listed_filters(weight, 0, outputs, x.dtype)
        channel_conv.convolve(x, kept, inputs, outputs, geometry, y, Epilogue(bias))
    else:
        lists = list_blocks(mask.flatten(2).contiguous(), geometry, is_input_gradient=False)
        dense = BlockWeight(blocks.dense_blocks(weight, x.dtype), block, is_packed=False)
        block_conv.convolve(x, dense, lists, geometry, y, Epilogue(bias))
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
    """The gradient of x, in its shape, channels_last: the same kernel with the transposed weight."""
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    grad_x = empty_activation(tuple(x.shape), x.dtype, x.device)
    block = _block(pattern)
    if block is None:
        outputs, inputs = masked_channels(mask), all_channels(geometry.in_channels, x.device)
        kept = listed_filters(weight, 0, outputs, x.dtype)
        channel_conv.input_gradient(grad, kept, inputs, outputs, geometry, grad_x)
    else:
        lists = list_blocks(mask.flatten(2).contiguous(), geometry, is_input_gradient=True)
        dense = BlockWeight(blocks.dense_blocks(weight, x.dtype), block, is_packed=False)
        block_conv.input_gradient(grad, dense, lists, geometry, grad_x)
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
    """sign(S) · Σ_unit W · dW, as scores; the dense dW is never written."""
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    # A channel is a row of blocks.
    sums = score_sums(grad, x, weight.detach(), _block(pattern) or (1, _ROW), geometry)
    if _block(pattern) is None:
        sums = sums.sum((1, 2, 3))
    return (scores.detach().sign() * sums).to(scores.dtype)


def _block(pattern: str) -> Pair | None:
    """Sides of blocks; None of channels."""
    kind = parse_pattern(pattern)
    return (kind.bk, kind.bc) if isinstance(kind, Block) else None
