"""What is a data set? Three splits of uint8 images with labels, built by a loader that is known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vpns.config import DataConfig


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, on one device; what is selected stays where it is stored until it is read.

    Args:
        store: uint8 [M, 3, H, W], in memory or mapped from a file.
        labels: int64 [N].
        rows: int64 [N], the place of each image in the store; None for all of it, in order.
        larger: the store's images in a larger size, of which training crops are cut; None where they are
            cut of the store's own.
    """

    store: Tensor
    labels: Tensor
    rows: Tensor | None = None
    larger: Tensor | None = None

    def __post_init__(self) -> None:
        for store in (self.store, *([] if self.larger is None else [self.larger])):
            if store.dtype != torch.uint8 or store.ndim != 4 or store.shape[1] != 3:
                raise ValueError(
                    f"Split: expected uint8 images [N, 3, H, W], got {store.dtype} {list(store.shape)}"
                )
        count = len(self.store if self.rows is None else self.rows)
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise ValueError(
                f"Split: expected int64 labels [{count}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W]: read into memory, where only some of the store are wanted."""
        return self.store if self.rows is None else self.store[self.rows]

    def images_for(self, side: int) -> Tensor:
        """uint8 [N, 3, H, W] in the stored size from which a resize to this side loses least."""
        if self.larger is None or side <= self.store.shape[2]:
            return self.images
        return self.larger if self.rows is None else self.larger[self.rows]

    def select(self, indices: Tensor) -> Split:
        """The images and labels at these indices, in this order."""
        rows = indices if self.rows is None else self.rows[indices]
        return Split(self.store, self.labels[indices], rows, self.larger)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device, which then holds all of it; itself where it is there already."""
        if is_same_device(self.labels.device, torch.device(device)):
            return self
        larger = self.larger if self.larger is None or self.rows is None else self.larger[self.rows]
        return Split(
            self.images.to(device),
            self.labels.to(device),
            larger=None if larger is None else larger.to(device),
        )


def is_same_device(here: torch.device, wanted: torch.device) -> bool:
    """Whether a tensor is where it is wanted: a device without a number is any of its type."""
    return here.type == wanted.type and wanted.index in (None, here.index)


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
