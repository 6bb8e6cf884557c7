"""The embedded target task: scikit-learn's 1,797 scanned digits of 8 x 8 pixels, few of them to train on."""

from __future__ import annotations

import torch

from vpns.config import DataConfig
from vpns.data.base import ImageSet, Split, register
from vpns.data.splits import carve_splits

SIDE = 8


@register("digits")
def load_digits(config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """data.train_count images to train on, val_fraction of the others for validation, the rest for test.

    Without a train_count, val_fraction of all images go to validation, as many to test, the rest to training.
    """
    # scikit-learn takes a second to import, so only who asks for digits pays for it.
    from sklearn import datasets

    if config.load_size not in (0, SIDE):
        raise ValueError(f"load_digits: expected data.load_size 0 or {SIDE}, got {config.load_size}")
    bunch = datasets.load_digits()
    grey = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]  # [N, 1, 8, 8]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    digits = Split(grey.expand(-1, 3, -1, -1).contiguous(), labels)
    class_names = tuple(str(name) for name in bunch.target_names)

    count = len(digits)
    if config.train_count is None:
        share = round(config.val_fraction * count)
        test, val, train = carve_splits(labels, (share, share), seed, class_names, "the digits")
    else:
        share = round(config.val_fraction * (count - config.train_count))
        train, val, test = carve_splits(labels, (config.train_count, share), seed, class_names, "the digits")
    return ImageSet(digits.select(train), digits.select(val), digits.select(test), class_names)
