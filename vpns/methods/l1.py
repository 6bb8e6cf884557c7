"""L1 filter (Li et al., 2017): the filters of largest L1 norm stay, the same share in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns.masking import unit_scores
from vpns.methods.base import Method, Start, expect_channels, register


def score_filters(start: Start) -> dict[str, Tensor]:
    """Ranks, by stream, of the mean |W| of each filter of the fine-tuned network."""
    expect_channels("l1", start.pattern)
    assert start.fine_tuned is not None
    return unit_scores(start.fine_tuned, start.pattern, torch.abs)


L1 = register(Method("l1", score_filters, learns_scores=False, is_prompted=False, needs_fine_tuned=True))
