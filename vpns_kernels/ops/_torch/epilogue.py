"""What follows a convolution's sums? A residual, an activation, and one rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("none", "relu", "relu6")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this type are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finish(
    y: Tensor, residual: Tensor | None, act: str, out_dtype: torch.dtype, in_place: bool = False
) -> Tensor:
    """act(y + residual) in out_dtype, channels_last; rounded once where y is in sum_dtype.

    Args:
        in_place: y is nobody else's and needs no gradient.
    """
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual.to(y.dtype)
    if act == "relu":
        y = F.relu(y, inplace=in_place)
    elif act == "relu6":
        y = F.relu6(y, inplace=in_place)
    return y.to(out_dtype).contiguous(memory_format=torch.channels_last)
