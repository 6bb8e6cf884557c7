"""Tiny-ImageNet: 200 classes of 500 images of 64 x 64 pixels; its val split is tested on, as published."""

from __future__ import annotations

from pathlib import Path

import torch

from vpns.data.decode import is_image
from vpns.data.listing import Layout, Listing, Published, Samples, name_some
from vpns.data.mapped import register_layout
from vpns.torchvision import need_torchvision

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SIDE = 64


def read_tiny(home: Path) -> Listing:
    """Classes by wnids.txt, training images by folder and <class>_boxes.txt, test by val_annotations.txt."""
    class_names = tuple(sorted(_lines(home / "wnids.txt")))
    numbers = {name: number for number, name in enumerate(class_names)}
    train, problems = _read_train(home / "train", numbers)
    lines = [line.split("\t") for line in _lines(home / "val" / "val_annotations.txt")]
    problems += [
        f"line {number} of val_annotations.txt has no class"
        for number, row in enumerate(lines, 1)
        if len(row) < 2
    ]
    rows = [row[:2] for row in lines if len(row) > 1]
    strangers = sorted({row[1] for row in rows} - numbers.keys())
    if strangers:
        problems.append(f"val_annotations.txt has classes that are not in wnids.txt: {name_some(strangers)}")
    known = [(home / "val" / "images" / file, numbers[name]) for file, name in rows if name in numbers]
    return Listing(class_names, {"train": train, "test": _samples(known)}, tuple(problems))


def _read_train(folder: Path, numbers: dict[str, int]) -> tuple[Samples, list[str]]:
    found: list[tuple[Path, int]] = []
    problems: list[str] = []
    for name, number in numbers.items():
        images = folder / name / "images"
        boxes = folder / name / f"{name}_boxes.txt"
        files = {path.name for path in images.iterdir() if is_image(path)} if images.is_dir() else set()
        # What should be there, where that is known; a file that is not is found missing by whoever asks.
        listed = {line.split("\t")[0] for line in _lines(boxes)} if boxes.is_file() else set()
        found += [(images / file, number) for file in sorted(files | listed)]
        if not files:
            problems.append(f"no images in train/{name}")
        misplaced = sorted(file for file in files if file.partition("_")[0] != name)
        if misplaced:
            problems.append(f"images in train/{name} are named for another class: {name_some(misplaced)}")
    return _samples(found), problems


def _samples(pairs: list[tuple[Path, int]]) -> Samples:
    return Samples(
        tuple(file for file, _ in pairs), torch.tensor([label for _, label in pairs], dtype=torch.int64)
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"load_tiny-imagenet: expected the file {path}, got none (half-downloaded?)")
    return [line for line in path.read_text().splitlines() if line.strip()]


def _download(root: Path) -> None:
    utils = need_torchvision("download", "datasets.utils")
    utils.download_and_extract_archive(_URL, str(root), md5=_MD5)


register_layout(
    Layout(
        name="tiny-imagenet",
        homes=("tiny-imagenet-200", "tiny_imagenet/tiny-imagenet-200"),
        read=read_tiny,
        side=SIDE,
        published=Published(200, 100_000, 10_000),
        download=_download,
    )
)
