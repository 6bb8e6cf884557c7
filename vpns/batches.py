"""Which images does an iteration see? Seed, stage, epoch and iteration alone decide, so a run can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vpns.config import DataConfig
from vpns.data import Split, crop_from, make_batch

# Images of a batch that is only looked at, not trained on.
LOOKED_AT_ONCE = 256


@dataclass(frozen=True)
class Pass:
    """One of an iteration's updates: whether its images carry the prompt, and whether they are augmented."""

    prompted: bool
    augmented: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """Images [N, 3, size, size] in [0, 1] and their labels [N]."""

    images: Tensor
    labels: Tensor
    prompted: bool

    def split(self, parts: int) -> list[Batch]:
        """That many parts in order, which differ by one image at most; fewer where there are fewer images."""
        parts = max(1, min(parts, len(self.labels)))
        pairs = zip(self.images.tensor_split(parts), self.labels.tensor_split(parts), strict=True)
        return [Batch(images, labels, self.prompted) for images, labels in pairs]


def derive_seed(*parts: int | str) -> int:
    """A seed of its own for each purpose and position."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def count_iterations(split: Split, batch_size: int) -> int:
    """Iterations in an epoch."""
    return -(-len(split) // batch_size)


def iterate_epoch(
    split: Split,
    passes: tuple[Pass, ...],
    position: tuple[str, int, int],
    batch_size: int,
    size: int,
    data: DataConfig,
    seed: int,
) -> Iterator[tuple[Batch, ...]]:
    """The batches, one per pass, of each iteration of an epoch; every pass has an order of its own.

    Args:
        position: stage, epoch and the iteration to begin with.
        batch_size: the most images of a batch; batches of an epoch differ by one at most, since batch norm
            cannot train on a last batch of one image.
        size: side of the images in pixels.
    """
    stage, epoch, first = position
    orders = [
        _order(split, derive_seed(seed, stage, "order", epoch, number)).tensor_split(
            count_iterations(split, batch_size)
        )
        for number in range(len(passes))
    ]
    for iteration in range(first, count_iterations(split, batch_size)):
        batches = []
        for number, kind in enumerate(passes):
            generator = torch.Generator().manual_seed(
                derive_seed(seed, stage, "augment", epoch, iteration, number)
            )
            part = split.select(orders[number][iteration])
            stored = part.images_for(crop_from(size) if kind.augmented and data.crop else size)
            images = make_batch(
                stored, size, generator if kind.augmented else None, flip=data.flip, crop=data.crop
            )
            batches.append(Batch(images, part.labels, kind.prompted))
        yield tuple(batches)


def iterate_split(
    split: Split, size: int, prompted: bool, batch_size: int = LOOKED_AT_ONCE
) -> Iterator[Batch]:
    """The images of a split in order, as at test time."""
    for rows in torch.arange(len(split), device=split.labels.device).split(batch_size):
        part = split.select(rows)
        yield Batch(make_batch(part.images_for(size), size), part.labels, prompted)


def _order(split: Split, seed: int) -> Tensor:
    """Where the labels are, for the whole epoch: a copy for each batch would wait for the device."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return order.to(split.labels.device)
