"""The truth: concatenate, sort, count. NaN anywhere gives NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def why_not(scores: Sequence[Tensor], kept: int) -> str | None:
    """The reference takes everything."""
    return None


def run(scores: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    magnitude = torch.cat([tensor.flatten() for tensor in scores]).abs().sort(descending=True).values
    threshold = magnitude[kept - 1]
    ties_kept = kept - (magnitude > threshold).sum()
    # NaN sorts first, so one look at the largest finds it.
    return torch.where(magnitude[0].isnan(), magnitude[0], threshold), ties_kept
