"""How are some channels of an activation taken?"""

from __future__ import annotations

import torch
from torch import Tensor


def take_channels(x: Tensor, channels: Tensor) -> Tensor:
    """x[:, channels], channels_last where x is: torch would turn it, and the convolution turn it back."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return x.index_select(1, channels)
