"""Is every published data set read from the layout it lies in, whole, and refused by name where it is not?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.vpns import small_sets
from tests.vpns.small_sets import MAKERS, make_set
from vpns.config import DataConfig
from vpns.data import ImageSet, load_data
from vpns.data.download import download_data
from vpns.data.listing import LAYOUTS

CANVAS = 16


def load(name: str, root: Path, **settings: int) -> ImageSet:
    return load_data(DataConfig(name=name, root=str(root), **settings), seed=7, canvas=CANVAS)


@pytest.mark.parametrize("home", MAKERS)
def test_every_layout_is_read_and_split(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    published, side = LAYOUTS[name].published, LAYOUTS[name].side or CANVAS
    assert published is not None
    images = load(name, tmp_path, val_fraction=0.2)
    assert (len(images.class_names), len(images.test)) == (published.classes, published.test)
    assert len(images.train) + len(images.val) == published.train
    assert len(images.val) == round(0.2 * published.train)
    assert images.train.images.shape == (len(images.train), 3, side, side)
    for split in (images.train, images.val, images.test):
        assert torch.bincount(split.labels, minlength=3).min() > 0
        if not name.startswith("cifar"):
            # Each class has a grey of its own, so that labels can be told from pixels.
            greys = split.images[:, 0, -2, 2].float()
            means = torch.stack([greys[split.labels == label].mean() for label in range(3)])
            assert ((greys - means[split.labels]).abs() < 12).all()
            assert means.sort().values.diff().min() > 30


@pytest.mark.parametrize("home", MAKERS)
def test_the_root_may_be_above_the_set_or_the_set_itself(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    parts = Path(home).parts
    for depth in range(len(parts) + 1):
        assert LAYOUTS[name].find(tmp_path.joinpath(*parts[:depth])) == tmp_path / home


@pytest.mark.parametrize("home", MAKERS)
def test_a_set_that_is_not_there_is_refused_with_where_it_would_be(home: str, tmp_path: Path) -> None:
    name, _ = MAKERS[home]
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=f"load_{name}: expected .* in data.root, got {tmp_path}"):
        load(name, tmp_path)
    with pytest.raises(ValueError, match=r"expected data\.root"):
        load_data(DataConfig(name=name), seed=7, canvas=CANVAS)


@pytest.mark.parametrize("home", [home for home in MAKERS if not home.startswith("cifar")])
def test_half_a_download_is_refused_by_what_is_missing(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    images = sorted(path for path in tmp_path.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    images[1].unlink()
    relative = images[1].relative_to(tmp_path / home)
    # Where nothing lists the files, their published count is what tells.
    missing = f"{relative}|expected .* images in (train|test), got"
    with pytest.raises(
        ValueError, match=rf"load_{name}: expected a whole data set.*({missing}).*vpns data check"
    ):
        load(name, tmp_path)


@pytest.mark.parametrize("home", ["cifar-10-batches-py", "cifar-100-python", "flowers-102"])
def test_files_with_another_checksum_are_refused(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    biggest = max((tmp_path / home).glob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"as torchvision reads it, got {tmp_path} .*corrupted"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("home", "lost"),
    [
        ("tiny-imagenet-200", "wnids.txt"),
        ("tiny-imagenet-200", "val/val_annotations.txt"),
        ("dtd/dtd", "labels/val1.txt"),
        ("food-101", "meta/test.json"),
        ("oxford-iiit-pet", "annotations/test.txt"),
        ("stanford_cars", "devkit/cars_meta.mat"),
    ],
)
def test_a_set_without_its_lists_is_refused(
    home: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    (tmp_path / home / lost).unlink()
    with pytest.raises(ValueError, match=rf"expected .*got .*({Path(lost).name}|{tmp_path}|none)"):
        load(name, tmp_path)


def test_labels_that_disagree_with_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_set("food-101", tmp_path, monkeypatch)
    path = tmp_path / "food-101" / "meta" / "train.json"
    listed = json.loads(path.read_text())
    listed["pie"][3], listed["soup"][3] = listed["soup"][3], listed["pie"][3]
    path.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"labels of 2 images disagree with folders: images/soup/train3.jpg"):
        load(name, tmp_path)


def test_a_pet_with_the_label_of_another_breed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set("oxford-iiit-pet", tmp_path, monkeypatch)
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text(path.read_text().replace("pug_test1 3", "pug_test1 1"))
    with pytest.raises(ValueError, match="label 1 is given to images of Abyssinian, pug"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("home", "old", "new", "words"),
    [
        (
            "tiny-imagenet-200",
            "train/n01/images/n01_0.JPEG",
            "train/n02/images/n01_0.JPEG",
            "another class: n01_0",
        ),
        (
            "imagenet",
            "train/n01/n01_0.JPEG",
            "train/n02/n01_0.JPEG",
            "another class's folder: train/n02/n01_0",
        ),
    ],
)
def test_an_image_in_another_classs_folder_is_named(
    home: str, old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    (tmp_path / home / old).rename(tmp_path / home / new)
    with pytest.raises(ValueError, match=words):
        load(name, tmp_path)


def test_a_class_of_validation_that_training_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set("tiny-imagenet-200", tmp_path, monkeypatch)
    path = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n02", "n99"))
    with pytest.raises(ValueError, match=r"classes that are not in wnids.txt: n99"):
        load(name, tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].partition("\t")[0]]))
    with pytest.raises(ValueError, match=rf"line {len(lines)} of val_annotations.txt has no class"):
        load(name, tmp_path)


def test_flowers_of_two_names_for_a_label_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_set("oxford_flowers", tmp_path, monkeypatch)
    path = tmp_path / "oxford_flowers" / "split_zhou_OxfordFlowers.json"
    content = json.loads(path.read_text())
    content["test"][0][2] = "daisy"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="label 0 has several names: daisy, rose"):
        load(name, tmp_path)
    path.write_text('{"train": []}')
    with pytest.raises(ValueError, match=rf"expected rows of file, label and name, got others in {path}"):
        load(name, tmp_path)


@pytest.mark.parametrize("home", ["cifar-10-batches-py", "tiny-imagenet-200"])
def test_sets_of_one_size_keep_it(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_set(home, tmp_path, monkeypatch)
    side = LAYOUTS[name].side
    assert load(name, tmp_path, load_size=side).test.images.shape[2] == side
    with pytest.raises(ValueError, match=rf"expected data\.load_size 0 or {side}, got 20"):
        load(name, tmp_path, load_size=20)


@pytest.mark.parametrize(("home", "is_exact"), [("food-101", True), ("tiny-imagenet-200", False)])
def test_network_input_is_that_of_the_published_transforms(
    home: str, is_exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Pillow from the file, at 9/8 of the canvas and at the canvas; small images stay small until used."""
    monkeypatch.setattr(small_sets, "write_image", _write_noise)
    name = make_set(home, tmp_path, monkeypatch)
    images = load(name, tmp_path)
    files = {}
    for samples in LAYOUTS[name].read(tmp_path / home).splits.values():
        for file in samples.files:
            with Image.open(file) as image:
                files[file] = image.convert("RGB")
    # Resized from 64 pixels by torch, without rounding to grey levels.
    bound = 0.0 if is_exact else 1.01 / 255
    for split, side in ((images.train, CANVAS), (images.test, CANVAS), (images.train, CANVAS * 9 // 8)):
        stored = split.images_for(side)[:2].float() / 255
        if stored.shape[2] != side:
            stored = torch.nn.functional.interpolate(stored, (side, side), mode="bilinear", antialias=True)
        for one in stored:
            gaps = [(one - _pillow(image, side)).abs().max() for image in files.values()]
            assert min(gaps) <= bound


def _write_noise(path: Path, grey: int, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(sum(map(ord, str(path))))
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)


def _pillow(image: Image.Image, side: int) -> torch.Tensor:
    """As torchvision's Resize and ToTensor on a Pillow image."""
    resized = image.resize((side, side), Image.Resampling.BILINEAR)
    return (
        torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        .reshape(side, side, 3)
        .permute(2, 0, 1)
        / 255
    )


def test_nothing_is_downloaded_unless_asked_and_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setitem(LAYOUTS, "dtd", replace(LAYOUTS["dtd"], download=asked.append))
    with pytest.raises(FileNotFoundError, match="--download fetches it"):
        load("dtd", tmp_path)
    assert asked == []
    download_data("dtd", tmp_path / "new")
    assert asked == [tmp_path / "new"]
    for name, words in (
        ("imagenet", "image-net.org"),
        ("stanford-cars", "Kaggle"),
        ("digits", "got 'digits'"),
    ):
        with pytest.raises(ValueError, match=rf"download_data: expected a name in \['cifar10'.*{words}"):
            download_data(name, tmp_path)

    def fails(root: Path) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(LAYOUTS, "dtd", replace(LAYOUTS["dtd"], download=fails))
    with pytest.raises(ConnectionError, match=r"expected to download dtd .* no route to host"):
        download_data("dtd", tmp_path)
