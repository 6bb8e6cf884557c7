"""What is a data set? Three splits of uint8 images with labels, built by a loader that is known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vpns.config import DataConfig


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, 3, H, W] and their labels int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                "Split: expected uint8 images [N, 3, H, W], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Split: expected int64 labels [{len(self.images)}], "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> Split:
        """The images and labels at these indices, in this order."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Train to learn, val to select, test to touch once at the end; labels index class_names."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]


# Called with the configuration, the seed of the splits and the canvas (side of the network input in pixels).
Loader = Callable[[DataConfig, int, int], ImageSet]
DATASETS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Function decorator: makes a loader known under a name."""

    def add(loader: Loader) -> Loader:
        DATASETS[name] = loader
        return loader

    return add


def load_data(config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """The data set that the configuration names; the splits depend on the seed alone.

    Args:
        canvas: side in pixels at which images of no common size are stored if config.load_size is 0.
    """
    if config.name not in DATASETS:
        raise ValueError(f"load_data: expected data.name in {sorted(DATASETS)}, got {config.name!r}")
    return DATASETS[config.name](config, seed, canvas)
