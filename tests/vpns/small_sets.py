"""Miniature copies of published data sets, as they lie on disk: a few images of flat colours each."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vpns.data import DATASETS, LAYOUTS
from vpns.data.listing import Published
from vpns.data.mapped import register_layout
from vpns_kernels.torchvision_import import import_torchvision

CLASSES = 3


def write_image(path: Path, grey: int, size: tuple[int, int] = (48, 40)) -> None:
    """An image of one grey, its upper half darker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), grey, np.uint8)
    pixels[: size[1] // 2] //= 2
    Image.fromarray(pixels).save(path)


def make_cifar10(root: Path, patch: pytest.MonkeyPatch) -> Published:
    batches = {f"data_batch_{number}": 6 for number in range(1, 6)} | {"test_batch": 6}
    names = {"batches.meta": ("label_names", ["plane", "car", "bird"])}
    _write_cifar(root / "cifar-10-batches-py", batches, "labels", names, "CIFAR10", patch)
    return Published(CLASSES, 30, 6)


def make_cifar100(root: Path, patch: pytest.MonkeyPatch) -> Published:
    names = {"meta": ("fine_label_names", ["apple", "bear", "cup"])}
    _write_cifar(root / "cifar-100-python", {"train": 30, "test": 6}, "fine_labels", names, "CIFAR100", patch)
    return Published(CLASSES, 30, 6)


def make_tiny_imagenet(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home, wnids = root / "tiny-imagenet-200", ["n01", "n02", "n03"]
    home.mkdir(parents=True)
    (home / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    for number, name in enumerate(wnids):
        files = [f"{name}_{index}.JPEG" for index in range(10)]
        for index, file in enumerate(files):
            write_image(home / "train" / name / "images" / file, 60 * number + index, (64, 64))
        boxes = "".join(f"{file}\t0\t0\t63\t63\n" for file in files)
        (home / "train" / name / f"{name}_boxes.txt").write_text(boxes)
    rows = [f"val_{index}.JPEG\t{wnids[index % 3]}\t0\t0\t63\t63\n" for index in range(6)]
    for index in range(6):
        write_image(home / "val" / "images" / f"val_{index}.JPEG", 60 * (index % 3), (64, 64))
    (home / "val" / "val_annotations.txt").write_text("".join(rows))
    return Published(CLASSES, 30, 6)


def make_dtd(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "dtd" / "dtd"
    (home / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        rows = [
            f"{name}/{name}_{split}{index}.jpg"
            for name in ("banded", "dotted", "woven")
            for index in range(6)
        ]
        (home / "labels" / f"{split}1.txt").write_text("\n".join(rows) + "\n")
        for number, row in enumerate(rows):
            write_image(home / "images" / row, 60 * (number // 6) + number % 6)
    return Published(CLASSES, 36, 18)


def make_flowers102(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "flowers-102"
    labels = [index % CLASSES + 1 for index in range(54)]
    for index, label in enumerate(labels, 1):
        write_image(home / "jpg" / f"image_{index:05d}.jpg", 60 * label)
    savemat(home / "imagelabels.mat", {"labels": np.array(labels)})
    splits = {
        name: np.arange(18 * number + 1, 18 * number + 19)
        for number, name in enumerate(("trnid", "valid", "tstid"))
    }
    savemat(home / "setid.mat", splits)
    found = import_torchvision("datasets").Flowers102
    sums = {
        what: (file, _md5(home / file)) if what != "image" else (file, md5)
        for what, (file, md5) in found._file_dict.items()
        if what == "image" or (home / file).is_file()
    }
    patch.setattr(found, "_file_dict", sums)
    patch.setattr(found, "classes", ["rose", "lily", "iris"])
    return Published(CLASSES, 36, 18)


def make_flowers_coop(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home, rows = root / "oxford_flowers", []
    for index in range(54):
        write_image(home / "jpg" / f"image_{index:05d}.jpg", 60 * (index % 3))
        rows.append([f"image_{index:05d}.jpg", index % 3, ("rose", "lily", "iris")[index % 3]])
    content = {"train": rows[:24], "val": rows[24:36], "test": rows[36:]}
    (home / "split_zhou_OxfordFlowers.json").write_text(json.dumps(content))
    return Published(CLASSES, 36, 18)


def make_food101(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "food-101"
    (home / "meta").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 4)):
        files = {
            name: [f"{name}/{split}{index}" for index in range(count)] for name in ("pie", "soup", "tart")
        }
        (home / "meta" / f"{split}.json").write_text(json.dumps(files))
        for number, names in enumerate(files.values()):
            for name in names:
                write_image(home / "images" / f"{name}.jpg", 60 * number)
    return Published(CLASSES, 30, 12)


def make_pets(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "oxford-iiit-pet"
    (home / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 10), ("test", 4)):
        rows = [
            f"{breed}_{split}{index} {number} 1 1"
            for number, breed in enumerate(("Abyssinian", "great_pyrenees", "pug"), 1)
            for index in range(count)
        ]
        (home / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
        for number, row in enumerate(rows):
            write_image(home / "images" / f"{row.split()[0]}.jpg", 60 * (number // count))
    return Published(CLASSES, 30, 12)


def make_cars(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    names = np.array(["Audi 100", "BMW M3", "Fiat 500"], dtype=object)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": names})
    for split, count in (("train", 30), ("test", 12)):
        annotations = np.zeros(count, dtype=[("fname", object), ("class", int)])
        for index in range(count):
            annotations[index] = (f"{index:05d}.jpg", index % 3 + 1)
            write_image(home / f"cars_{split}" / f"{index:05d}.jpg", 60 * (index % 3))
        path = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(home / path, {"annotations": annotations})
    return Published(CLASSES, 30, 12)


def make_cars_kaggle(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "stanfordcars" / "car_data" / "car_data"
    for split, count in (("train", 10), ("test", 4)):
        for number, name in enumerate(("Audi 100", "BMW M3", "Fiat 500")):
            for index in range(count):
                write_image(home / split / name / f"{index}.jpg", 60 * number)
    return Published(CLASSES, 30, 12)


def make_imagenet(root: Path, patch: pytest.MonkeyPatch) -> Published:
    home = root / "imagenet"
    for number, name in enumerate(("n01", "n02", "n03")):
        for index in range(10):
            write_image(home / "train" / name / f"{name}_{index}.JPEG", 60 * number)
        for index in range(4):
            write_image(home / "val" / name / f"ILSVRC2012_val_{4 * number + index}.JPEG", 60 * number)
    return Published(CLASSES, 30, 12)


# Where each lies below its root, and the name of the data set.
MAKERS: dict[str, tuple[str, Callable[[Path, pytest.MonkeyPatch], Published]]] = {
    "cifar-10-batches-py": ("cifar10", make_cifar10),
    "cifar-100-python": ("cifar100", make_cifar100),
    "tiny-imagenet-200": ("tiny-imagenet", make_tiny_imagenet),
    "dtd/dtd": ("dtd", make_dtd),
    "flowers-102": ("flowers102", make_flowers102),
    "oxford_flowers": ("flowers102-coop", make_flowers_coop),
    "food-101": ("food101", make_food101),
    "oxford-iiit-pet": ("oxford-pets", make_pets),
    "stanford_cars": ("stanford-cars", make_cars),
    "stanfordcars/car_data/car_data": ("stanford-cars", make_cars_kaggle),
    "imagenet": ("imagenet", make_imagenet),
}


def make_set(home: str, root: Path, patch: pytest.MonkeyPatch) -> str:
    """Write the miniature of this home, take its counts for the published ones, and return its name."""
    name, make = MAKERS[home]
    published = make(root, patch)
    before, loader = LAYOUTS[name], DATASETS[name]
    patch.setitem(LAYOUTS, name, before)
    patch.setitem(DATASETS, name, loader)
    register_layout(replace(before, published=published))
    return name


def _write_cifar(
    home: Path,
    batches: dict[str, int],
    labels_key: str,
    names: dict[str, tuple[str, list[str]]],
    class_name: str,
    patch: pytest.MonkeyPatch,
) -> None:
    home.mkdir(parents=True)
    for seed, (file, count) in enumerate(batches.items()):
        data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": data, labels_key: [index % CLASSES for index in range(count)]}
        (home / file).write_bytes(pickle.dumps(content))
    ((meta, (key, class_names)),) = names.items()
    (home / meta).write_bytes(pickle.dumps({key: class_names}))
    found = getattr(import_torchvision("datasets"), class_name)
    is_test = [file.startswith("test") for file in batches]
    sums = [[file, _md5(home / file)] for file in batches]
    patch.setattr(found, "train_list", [one for one, test in zip(sums, is_test, strict=True) if not test])
    patch.setattr(found, "test_list", [one for one, test in zip(sums, is_test, strict=True) if test])
    patch.setattr(found, "meta", {"filename": meta, "key": key, "md5": _md5(home / meta)})


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
