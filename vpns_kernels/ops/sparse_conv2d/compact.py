"""Compact backend: a channel-pruned layer as the smaller dense convolution that it is, by torch, on any
device.

Kept input channels are gathered, kept output channels scattered among zeros (or the bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.formats import validate
from vpns_kernels.geometry import ConvGeometry, Pair


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
    kept_out, kept_in = layout
    K, C, R, S = weight_shape
    geometry = ConvGeometry(C, K, (R, S), stride, padding, dilation)
    validate(values, layout, geometry)
    is_whole_in, is_whole_out = kept_in.numel() == C, kept_out.numel() == K
    if values.numel() == 0:
        P, Q = geometry.output_size(x.shape[2], x.shape[3])
        return _fill(x, bias, (x.shape[0], K, P, Q))
    gathered = x if is_whole_in else x.index_select(1, kept_in)
    kept_bias = None if bias is None else bias.to(x.dtype) if is_whole_out else bias.to(x.dtype)[kept_out]
    weight = values.to(x.dtype).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(gathered, weight, kept_bias, stride, padding, dilation)
    y = y.contiguous(memory_format=torch.channels_last)
    if is_whole_out:
        return y
    return _fill(x, bias, (y.shape[0], K, *y.shape[2:])).index_copy_(1, kept_out.long(), y)


def _fill(x: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """What outputs without kept weights are: the bias, or zero."""
    full = x.new_zeros(shape) if bias is None else bias.to(x.dtype).view(1, -1, 1, 1).expand(shape).clone()
    return full.contiguous(memory_format=torch.channels_last)
