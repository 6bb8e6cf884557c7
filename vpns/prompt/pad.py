"""The frames: learned pixels around a smaller image (framed) or on the rim of a full one (released)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpns.config import PromptConfig
from vpns.prompt.base import Prompt, register
from vpns_kernels.geometry import PromptGeometry


class FramedPad(Prompt):
    """Image inside, prompt around it: sigmoid(raw), so that no clamp acts and every entry keeps learning."""

    raw: nn.Parameter
    mask: Tensor
    variant = "framed"

    def __init__(self, geometry: PromptGeometry, frozen: bool) -> None:
        super().__init__(geometry.canvas, geometry.inside)
        self.frame = geometry.frame
        self.raw = _zero_canvas(geometry, frozen)
        self.register_buffer("mask", geometry.frame_mask(), persistent=False)

    def compose(self, images: Tensor, prompted: bool) -> Tensor:
        canvas = F.pad(images, (self.frame,) * 4)
        return canvas + self.raw.sigmoid() * self.mask if prompted else canvas

    def describe(self) -> str:
        """What it looks like."""
        return f"A frame of {self.frame} pixels around a smaller image, on a canvas of {self.canvas}"

    @property
    def learned(self) -> int:
        """Entries of raw that may act."""
        return 3 * int(self.mask.sum())


class ReleasedPad(Prompt):
    """The published code's: raw is added to the border of the full image, and the sum clamped to [0, 1]."""

    raw: nn.Parameter
    mask: Tensor
    variant = "released"

    def __init__(self, geometry: PromptGeometry, frozen: bool) -> None:
        super().__init__(geometry.canvas, geometry.canvas)
        self.frame = geometry.frame
        self.raw = _zero_canvas(geometry, frozen)
        self.register_buffer("mask", geometry.frame_mask(), persistent=False)

    def compose(self, images: Tensor, prompted: bool) -> Tensor:
        return (images + self.raw * self.mask).clamp(0, 1) if prompted else images

    def describe(self) -> str:
        """What it looks like."""
        return f"A frame of {self.frame} pixels laid over the border of an image of {self.canvas}"

    @property
    def learned(self) -> int:
        """Entries of raw that may act."""
        return 3 * int(self.mask.sum())


VARIANTS = {"framed": FramedPad, "released": ReleasedPad}


@register("pad")
def build_pad(config: PromptConfig) -> Prompt:
    """A frame of config.frame pixels on a canvas of config.canvas."""
    if config.variant not in VARIANTS:
        raise ValueError(f"build_pad: expected prompt.variant in {sorted(VARIANTS)}, got {config.variant!r}")
    return VARIANTS[config.variant](PromptGeometry(config.canvas, config.frame), config.frozen)


@register("expand")
def build_expand(config: PromptConfig) -> Prompt:
    """All that a shrunk image leaves of the canvas (ILM-VP's), whichever way the run trains."""
    return FramedPad(PromptGeometry(config.canvas, config.frame), config.frozen)


def _zero_canvas(geometry: PromptGeometry, frozen: bool) -> nn.Parameter:
    """Of the whole canvas; the mask keeps gradients outside the frame at zero."""
    return nn.Parameter(torch.zeros(3, geometry.canvas, geometry.canvas), requires_grad=not frozen)
