"""No prompt: the full image at canvas size, without parameters."""

from __future__ import annotations

from torch import Tensor

from vpns.config import PromptConfig
from vpns.prompt.base import Prompt, register


class NoPrompt(Prompt):
    """Normalisation alone, whether prompted or not."""

    variant = "framed"

    def compose(self, images: Tensor, prompted: bool) -> Tensor:
        return images

    def describe(self) -> str:
        """Nothing of its own."""
        return f"No prompt: images fill a canvas of {self.canvas} pixels"


@register("none")
def build_none(config: PromptConfig) -> Prompt:
    """The image at config.canvas."""
    return NoPrompt(config.canvas, config.canvas)
