"""A user's own images: one folder per class, in train, val and test, or all together."""

from __future__ import annotations

from pathlib import Path

import torch

from vpns.data.decode import SUFFIXES, is_image
from vpns.data.listing import Layout, Listing, Samples
from vpns.data.mapped import register_layout


def read_folder(home: Path) -> Listing:
    """The images of home/train, home/val and home/test, or of home alone; all below <class>/.

    Raises:
        ValueError: fewer than two classes, a class without images, splits of other classes.
    """
    folders = {name: home / name for name in ("train", "val", "test") if (home / name).is_dir()}
    if folders and "train" not in folders:
        raise ValueError(
            f"load_folder: expected {home / 'train'} beside {', '.join(map(str, folders.values()))}"
        )
    other_names = [name for name in ("valid", "validation", "dev") if (home / name).is_dir()]
    if folders and other_names:
        raise ValueError(
            f"load_folder: expected splits named train, val and test in {home}, got {other_names[0]}"
        )
    folders = folders or {"train": home}
    class_names = list_classes(folders["train"])
    if len(class_names) < 2:
        raise ValueError(
            f"load_folder: expected at least 2 class folders in {folders['train']}, got {list(class_names)}"
        )
    return Listing(class_names, {name: read_classes(folder, class_names) for name, folder in folders.items()})


def list_classes(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder that are not hidden, in order."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))


def read_classes(folder: Path, class_names: tuple[str, ...]) -> Samples:
    """All images below folder/<class>, in the order of their paths."""
    if list_classes(folder) != class_names:
        raise ValueError(
            f"load_folder: expected in {folder} the class folders of the training images, "
            f"got a difference in {sorted(set(list_classes(folder)) ^ set(class_names))}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(path for path in (folder / name).rglob("*") if is_image(path))
        if not found:
            raise ValueError(
                f"load_folder: expected images in the class folder {folder / name}, got none "
                f"({' '.join(SUFFIXES)})"
            )
        files += found
        labels += [label] * len(found)
    return Samples(tuple(files), torch.tensor(labels))


FOLDER = register_layout(Layout("folder", (".",), read_folder))
