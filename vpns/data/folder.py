"""A user's own images: one folder per class, decoded once and kept as squares in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpns.config import DataConfig
from vpns.data.base import ImageSet, Split, register
from vpns.data.splits import carve_splits

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@register("folder")
def load_folder(config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """The images of root/train, root/val and root/test, or of root alone; all below <class>/.

    A split without a folder of its own is carved by seed from the training images: val_fraction of them.
    """
    if config.root is None:
        raise ValueError("load_folder: expected data.root, the path of an image folder, got None")
    root, size = Path(config.root), config.load_size or canvas
    if not root.is_dir():
        raise FileNotFoundError(f"load_folder: expected an image folder, got {root} (data.root)")
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if folders and "train" not in folders:
        raise ValueError(
            f"load_folder: expected {root / 'train'} beside {', '.join(map(str, folders.values()))}"
        )
    train_folder = folders.pop("train", root)
    class_names = _list_classes(train_folder)
    if len(class_names) < 2:
        raise ValueError(
            f"load_folder: expected at least 2 class folders in {train_folder}, got {list(class_names)}"
        )
    train = _read_split(train_folder, class_names, size)
    splits = {name: _read_split(folder, class_names, size) for name, folder in folders.items()}
    missing = [name for name in ("val", "test") if name not in splits]
    if missing:
        shares = [round(config.val_fraction * len(train))] * len(missing)
        *carved, rest = carve_splits(train.labels, shares, seed, class_names, str(train_folder))
        splits |= {name: train.select(part) for name, part in zip(missing, carved, strict=True)}
        train = train.select(rest)
    return ImageSet(train, splits["val"], splits["test"], class_names)


def _list_classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))


def _read_split(folder: Path, class_names: tuple[str, ...], size: int) -> Split:
    """All images below folder/<class>, in the order of their paths."""
    if _list_classes(folder) != class_names:
        raise ValueError(
            f"load_folder: expected in {folder} the class folders of the training images, "
            f"got a difference in {sorted(set(_list_classes(folder)) ^ set(class_names))}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(
                f"load_folder: expected images in the class folder {folder / name}, got none "
                f"({' '.join(SUFFIXES)})"
            )
        paths += found
        labels += [label] * len(found)
    # Pillow decodes without Python's lock; the threads are those that the run may use.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        pixels = np.stack(list(pool.map(lambda path: _read_image(path, size), paths)))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels))


def _read_image(path: Path, size: int) -> np.ndarray:
    """Decoded to RGB and resized to a square: uint8 [size, size, 3]."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:
        # Pillow's decoders raise many types, few of which name the file.
        raise ValueError(f"load_folder: expected an image that decodes, got {path} ({error})") from error
