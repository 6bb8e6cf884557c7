"""OMP, one-shot magnitude: the largest fine-tuned dense weights stay, at their pretrained values."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns.masking import unit_scores
from vpns.methods.base import Method, Start, register


def score_magnitudes(start: Start) -> dict[str, Tensor]:
    """|W| of the fine-tuned network; its mean in units of several weights."""
    assert start.fine_tuned is not None
    return unit_scores(start.fine_tuned, start.pattern, torch.abs)


OMP = register(Method("omp", score_magnitudes, learns_scores=False, is_prompted=False, needs_fine_tuned=True))
