"""What is a prompt? What turns images in [0, 1] into network input: a canvas, perhaps changed, normalised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vpns.config import PromptConfig

# Of ImageNet, as for all networks that torchvision publishes.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Prompt(nn.Module, ABC):
    """A canvas with the image on it; a learned prompt is the parameter `raw`, of the canvas's size.

    Args:
        canvas: side of the network input in pixels.
        image_size: side in pixels at which images must arrive.

    Attributes:
        raw: what is learned, if anything.
        variant: as `prompt_conv2d` composes it, or None for a prompt that it does not know.
        frame: width in pixels of what is around the image (framed) or lies over its border (released).
    """

    mean: Tensor
    std: Tensor
    raw: nn.Parameter | None
    variant: str | None = None
    frame: int = 0

    def __init__(self, canvas: int, image_size: int) -> None:
        super().__init__()
        self.canvas = canvas
        self.image_size = image_size
        self.register_parameter("raw", None)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), persistent=False)

    @abstractmethod
    def compose(self, images: Tensor, prompted: bool) -> Tensor:
        """The canvas [N, 3, canvas, canvas] in [0, 1], before normalisation."""

    @abstractmethod
    def describe(self) -> str:
        """What it looks like, in words."""

    @property
    def learned(self) -> int:
        """Entries of raw that may act."""
        return 0

    def forward(self, images: Tensor, prompted: bool = True) -> Tensor:
        """Normalised [N, 3, canvas, canvas] from images [N, 3, image_size, image_size] in [0, 1].

        Args:
            prompted: False gives the same geometry without the prompt.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"Prompt.forward: expected float images [N, {', '.join(map(str, expected))}], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return (self.compose(images, prompted) - self.mean) / self.std

    @torch.no_grad()
    def effective(self) -> Tensor:
        """The prompt as a picture [3, canvas, canvas] in [0, 1]: what it makes of a black image."""
        black = self.mean.new_zeros(1, 3, self.image_size, self.image_size)
        was_training = self.training
        try:
            return self.eval().compose(black, prompted=True)[0]
        finally:
            self.train(was_training)


Builder = Callable[[PromptConfig], Prompt]
PROMPTS: dict[str, Builder] = {}


def register(kind: str) -> Callable[[Builder], Builder]:
    """Function decorator: makes a prompt known under its kind."""

    def add(builder: Builder) -> Builder:
        PROMPTS[kind] = builder
        return builder

    return add


def build_prompt(config: PromptConfig) -> Prompt:
    """The prompt that the configuration names, at its start value."""
    if config.kind not in PROMPTS:
        raise ValueError(f"build_prompt: expected prompt.kind in {sorted(PROMPTS)}, got {config.kind!r}")
    return PROMPTS[config.kind](config)
