"""Data sets of image files that torchvision reads: DTD, Flowers102, Food101, Oxford pets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vpns.data.listing import Layout, Listing, Published, Samples, join, name_some
from vpns.data.mapped import register_layout
from vpns.torchvision import need_torchvision

# Where torchvision's classes keep their lists of files.
_FILE_LISTS = ("_image_files", "_images", "_samples")


def open_set(class_name: str, root: Path, **options: Any) -> Any:
    """torchvision's data set of this class, in a folder of the name that torchvision gives it.

    Raises:
        ValueError: naming the folder, where torchvision does not find what it needs.
    """
    datasets = need_torchvision(f"load_{class_name.lower()}", "datasets")
    try:
        return getattr(datasets, class_name)(root, download=False, **options)
    except Exception as error:
        # Half-downloaded files raise whatever their parsers do, seldom with a name.
        why = str(error).replace(" You can use download=True to download it", "")
        found = f"{root} ({type(error).__name__}: {why})"
        raise ValueError(f"open_set: expected {class_name} as torchvision reads it, got {found}") from error


def download_with(class_name: str, **options: Any) -> Callable[[Path], None]:
    """Fetches a set by torchvision's class of this name."""

    def fetch(root: Path) -> None:
        datasets = need_torchvision("download", "datasets")
        getattr(datasets, class_name)(root, download=True, **options)

    return fetch


def read_dtd(home: Path) -> Listing:
    """Split 1 of 10; trained on train and val together, as published."""
    train, val, test = (open_set("DTD", home.parents[1], split=split) for split in ("train", "val", "test"))
    folders = {path.name for path in (home / "images").iterdir() if path.is_dir()}
    absent = sorted(folders - {*train.classes})
    problems = [f"no label names the class folders {name_some(absent)}"] if absent else []
    return list_sets(train, {"train": [train, val], "test": [test]}, problems)


def read_flowers(home: Path) -> Listing:
    """The official splits of 1,020, 1,020 and 6,149; trained on the first two."""
    train, val, test = (
        open_set("Flowers102", home.parent, split=split) for split in ("train", "val", "test")
    )
    return list_sets(train, {"train": [train, val], "test": [test]})


def read_food(home: Path) -> Listing:
    """Classes by meta/train.json and meta/test.json, images in a folder of each class."""
    train, test = (open_set("Food101", home.parent, split=split) for split in ("train", "test"))
    problems = []
    for one in (train, test):
        pairs = zip(one._image_files, one._labels, strict=True)
        strangers = [
            str(file.relative_to(home)) for file, label in pairs if file.parent.name != one.classes[label]
        ]
        if strangers:
            problems.append(
                f"labels of {len(strangers):,} images disagree with folders: {name_some(strangers)}"
            )
    return list_sets(train, {"train": [train], "test": [test]}, problems)


def read_pets(home: Path) -> Listing:
    """Labels by annotations/trainval.txt and test.txt; each image's name begins with its breed."""
    train, test = (open_set("OxfordIIITPet", home.parent, split=split) for split in ("trainval", "test"))
    breeds: dict[int, set[str]] = {}
    for one in (train, test):
        for file, label in zip(one._images, one._labels, strict=True):
            breeds.setdefault(label, set()).add(file.stem.rpartition("_")[0])
    mixed = {label: sorted(names) for label, names in breeds.items() if len(names) > 1}
    problems = [
        f"label {label + 1} is given to images of {name_some(names)}" for label, names in mixed.items()
    ]
    return list_sets(train, {"train": [train], "test": [test]}, problems)


def list_sets(first: Any, splits: dict[str, list[Any]], problems: list[str] | None = None) -> Listing:
    """The listing of one or more of torchvision's sets per split; the first gives the classes."""
    class_names = _classes(first)
    strangers = [
        f"{one._split} differs in the classes {name_some(sorted({*_classes(one)} ^ {*class_names}))}"
        for parts in splits.values()
        for one in parts
        if _classes(one) != class_names
    ]
    joined = {name: join(*map(_samples, parts)) for name, parts in splits.items()}
    return Listing(tuple(class_names), joined, (*(problems or ()), *strangers))


def _classes(one: Any) -> list[str]:
    """Older torchvisions have no names for Flowers102."""
    return list(one.classes) if hasattr(one, "classes") else [str(n) for n in range(max(one._labels) + 1)]


def _samples(one: Any) -> Samples:
    found = next(getattr(one, name) for name in _FILE_LISTS if hasattr(one, name))
    if hasattr(one, "_samples"):
        found, labels = zip(*found, strict=True)
    else:
        labels = one._labels
    return Samples(tuple(map(Path, found)), torch.tensor(labels, dtype=torch.int64))


register_layout(
    Layout(
        "dtd", ("dtd/dtd",), read_dtd, published=Published(47, 3_760, 1_880), download=download_with("DTD")
    )
)
register_layout(
    Layout(
        "flowers102",
        ("flowers-102",),
        read_flowers,
        published=Published(102, 2_040, 6_149),
        download=download_with("Flowers102"),
        hint="the paper's splits are those of flowers102-coop",
    )
)
register_layout(
    Layout(
        "food101",
        ("food-101",),
        read_food,
        published=Published(101, 75_750, 25_250),
        download=download_with("Food101"),
    )
)
register_layout(
    Layout(
        "oxford-pets",
        ("oxford-iiit-pet",),
        read_pets,
        published=Published(37, 3_680, 3_669),
        download=download_with("OxfordIIITPet"),
    )
)
