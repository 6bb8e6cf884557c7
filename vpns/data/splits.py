"""Which image belongs to which split? Each class is spread evenly over them; the seed decides the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def carve_splits(
    labels: Tensor, sizes: Sequence[int], seed: int, class_names: Sequence[str], source: str
) -> list[Tensor]:
    """Indices of one split for each size, then those of a last split with all the rest.

    Args:
        source: where the images are from, for messages.

    Raises:
        ValueError: some split would miss a class.
    """
    rest = len(labels) - sum(sizes)
    if min(*sizes, rest) < 1:
        raise ValueError(
            f"carve_splits: expected at least one image per split, got splits of {[*sizes, rest]} "
            f"from the {len(labels)} images of {source}"
        )
    splits = list(stratified_order(labels, seed).split([*sizes, rest]))
    for split in splits:
        present = torch.bincount(labels[split], minlength=len(class_names))
        if present.min() == 0:
            absent = int(present.argmin())
            raise ValueError(
                f"carve_splits: expected every class in every split, got none of {class_names[absent]!r} "
                f"({int((labels == absent).sum())} images) in a split of {len(split)} of the {len(labels)} "
                f"images of {source} (it takes more images of that class, or a larger split)"
            )
    return splits


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of all images in which every stretch has the classes in nearly their overall shares."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels)
    ranks = torch.cat([torch.arange(int(size), dtype=torch.float64) for size in sizes])
    # The r-th of n images of a class stands at (r + 1/2) / n of the way through the whole order.
    places = (ranks + 0.5) / sizes.repeat_interleave(sizes)
    return by_class[places.argsort(stable=True)]
