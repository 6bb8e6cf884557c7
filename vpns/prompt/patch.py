"""The patch prompts: a learned square laid over the full image, in its corner or anywhere, as published.

The square has as many pixels as a frame of config.frame would: 115 by 115 for 16 around a canvas of 224.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vpns.config import PromptConfig
from vpns.prompt.base import Prompt, register
from vpns_kernels.geometry import PromptGeometry


class PatchPrompt(Prompt):
    """clamp(image + sigmoid(raw), 0, 1) within the square; raw covers the canvas: each place has its own.

    Args:
        side: of the square in pixels.
        moves: whether each forward of training draws a place for the square, the same for all its images; it
            stands in the corner otherwise, and in the middle where nothing is trained.
    """

    raw: nn.Parameter

    def __init__(self, canvas: int, side: int, moves: bool, frozen: bool) -> None:
        super().__init__(canvas, canvas)
        self.side, self.moves = side, moves
        self.raw = nn.Parameter(torch.zeros(3, canvas, canvas), requires_grad=not frozen)

    def compose(self, images: Tensor, prompted: bool) -> Tensor:
        if not prompted:
            return images
        top, left = self._place()
        mask = torch.zeros(self.canvas, self.canvas, dtype=images.dtype, device=images.device)
        mask[top : top + self.side, left : left + self.side] = 1
        return (images + self.raw.sigmoid() * mask).clamp(0, 1)

    def describe(self) -> str:
        """What it looks like."""
        place = "at a place drawn for each batch" if self.moves else "in the upper left corner"
        return f"A square of {self.side} pixels {place}, laid over an image of {self.canvas}"

    @property
    def learned(self) -> int:
        """Entries of raw that may act."""
        return 3 * (self.canvas if self.moves else self.side) ** 2

    def _place(self) -> tuple[int, int]:
        room = self.canvas - self.side
        if not self.moves:
            return 0, 0
        if not self.training:
            return room // 2, room // 2
        # As published: the last place of all is never drawn. A square of the whole canvas has but one.
        top, left = torch.randint(max(room, 1), (2,)).tolist()
        return top, left


def patch_side(geometry: PromptGeometry) -> int:
    """Side in pixels of a square with as many pixels as the frame, rounded down."""
    return max(1, math.isqrt(geometry.canvas**2 - geometry.inside**2))


@register("fix")
def build_fix(config: PromptConfig) -> Prompt:
    """A square in the upper left corner."""
    side = patch_side(PromptGeometry(config.canvas, config.frame))
    return PatchPrompt(config.canvas, side, moves=False, frozen=config.frozen)


@register("random")
def build_random(config: PromptConfig) -> Prompt:
    """A square anywhere."""
    side = patch_side(PromptGeometry(config.canvas, config.frame))
    return PatchPrompt(config.canvas, side, moves=True, frozen=config.frozen)
