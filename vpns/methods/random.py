"""Random: every unit of every layer has the same chance to stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns.masking import unit_scores
from vpns.methods.base import Method, Start, register


def draw_scores(start: Start) -> dict[str, Tensor]:
    """Uniform in [0, 1), drawn from the seed."""
    generator = torch.Generator().manual_seed(start.seed)
    shapes = unit_scores(start.pretrained, start.pattern, torch.abs)
    return {name: torch.rand(units.shape, generator=generator) for name, units in shapes.items()}


RANDOM = register(Method("random", draw_scores, learns_scores=False, is_prompted=False))
