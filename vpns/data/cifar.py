"""CIFAR-10 and CIFAR-100: 60,000 images of 32 x 32 pixels in a few files, which torchvision reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpns.data.listing import Layout, Listing, Published, Samples
from vpns.data.mapped import register_layout
from vpns.data.torchvision_sets import download_with, open_set

SIDE = 32


def _read(class_name: str, home: Path) -> Listing:
    """torchvision compares the files' checksums before it unpickles them."""
    sets = {name: open_set(class_name, home.parent, train=name == "train") for name in ("train", "test")}
    return Listing(tuple(sets["train"].classes), {name: _samples(one, home) for name, one in sets.items()})


def _samples(one: Any, home: Path) -> Samples:
    files = tuple(home / name for name, _ in (one.train_list if one.train else one.test_list))
    pixels = torch.from_numpy(np.ascontiguousarray(one.data.transpose(0, 3, 1, 2)))
    return Samples(files, torch.tensor(one.targets), pixels)


for _name, _class_name, _home, _classes in (
    ("cifar10", "CIFAR10", "cifar-10-batches-py", 10),
    ("cifar100", "CIFAR100", "cifar-100-python", 100),
):
    register_layout(
        Layout(
            name=_name,
            homes=(_home,),
            read=lambda home, class_name=_class_name: _read(class_name, home),  # type: ignore[misc]
            side=SIDE,
            published=Published(_classes, train=50_000, test=10_000),
            download=download_with(_class_name, train=True),
        )
    )
