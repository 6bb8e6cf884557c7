"""How does a channel-pruned layer run? As the smaller dense convolution that it is, by torch, on any device.

Kept input channels are gathered, kept output channels scattered among zeros (or the bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.formats import validate
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._torch.channels import take_channels


def convolve_compact(
    x: Tensor, values: Tensor, layout: Sequence[Tensor], bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """[N, C, H, W] → [N, K, P, Q] in the dtype of x, channels_last."""
    validate(values, layout, geometry)
    kept_out, kept_in = layout
    K = geometry.out_channels
    is_whole_in, is_whole_out = kept_in.numel() == geometry.in_channels, kept_out.numel() == K
    if values.numel() == 0:
        P, Q = geometry.output_size(x.shape[2], x.shape[3])
        return _fill(x, bias, (x.shape[0], K, P, Q))
    gathered = x if is_whole_in else take_channels(x, kept_in)
    kept_bias = None if bias is None else bias.to(x.dtype) if is_whole_out else bias.to(x.dtype)[kept_out]
    weight = values.to(x.dtype).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(gathered, weight, kept_bias, geometry.stride, geometry.padding, geometry.dilation)
    y = y.contiguous(memory_format=torch.channels_last)
    if is_whole_out:
        return y
    return _fill(x, bias, (y.shape[0], K, *y.shape[2:])).index_copy_(1, kept_out.long(), y)


def _fill(x: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """What outputs without kept weights are: the bias, or zero."""
    full = x.new_zeros(shape) if bias is None else bias.to(x.dtype).view(1, -1, 1, 1).expand(shape).clone()
    return full.contiguous(memory_format=torch.channels_last)
