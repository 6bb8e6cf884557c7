"""Are images stored, split and augmented as they should be, and is bad input refused in plain words?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vpns.config import DataConfig
from vpns.data import DATASETS, LAYOUTS, ImageSet, Split, load_data, make_batch
from vpns.data.base import is_same_device
from vpns.data.letters import LETTERS, draw_letters
from vpns.data.splits import carve_splits, stratified_order


@pytest.fixture(scope="module")
def letters() -> Split:
    return draw_letters()


def random_images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def write_image(path: Path, grey: int = 128, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (grey, grey, grey)).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images of each of two classes, each image of its own grey level."""
    for index in range(10):
        write_image(tmp_path / "set" / "cats" / f"{index}.png", 10 * index)
        write_image(tmp_path / "set" / "dogs" / f"{index}.png", 10 * index + 100)
    return tmp_path / "set"


def load_folder(root: Path, seed: int = 7, **settings: float) -> ImageSet:
    return load_data(DataConfig(name="folder", root=str(root), **settings), seed, canvas=16)


def grey_levels(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


# The embedded sets


def test_letters_are_the_same_at_every_call_and_leave_the_global_generator_alone(letters: Split) -> None:
    state = torch.get_rng_state()
    again = draw_letters()
    assert torch.equal(letters.images, again.images)
    assert torch.equal(letters.labels, again.labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_letter_is_drawn_66_times_in_grey(letters: Split) -> None:
    assert letters.images.shape == (3432, 3, 32, 32)
    assert torch.bincount(letters.labels).tolist() == [66] * 52
    assert torch.equal(letters.images[:, 0], letters.images[:, 2])


def test_every_letter_is_visible_and_no_two_images_are_alike(letters: Split) -> None:
    assert letters.images.flatten(1).amax(1).min() > 200
    assert len(torch.unique(letters.images.flatten(1), dim=0)) == len(letters)


def test_letters_are_light_on_dark_like_digits(letters: Split) -> None:
    border = torch.cat([letters.images[:, :, 0], letters.images[:, :, -1]], dim=2)
    assert border.float().mean() < letters.images[:, :, 12:20, 12:20].float().mean() / 3


def test_letters_are_split_whatever_the_target_task_is() -> None:
    images = load_data(DataConfig(name="letters", val_fraction=0.1, load_size=64), seed=7, canvas=224)
    assert (len(images.train), len(images.val), len(images.test)) == (2746, 343, 343)
    assert images.class_names == tuple(LETTERS)


def test_digits_are_split_into_disjoint_stratified_parts_of_the_named_sizes() -> None:
    images = load_data(DataConfig(), seed=7, canvas=32)
    assert (len(images.train), len(images.val), len(images.test)) == (100, 339, 1358)
    assert torch.bincount(images.train.labels).tolist() == [10] * 10
    assert torch.bincount(images.val.labels).min() >= 32
    assert images.class_names == tuple("0123456789")


def test_digits_keep_every_image_once_scaled_to_bytes() -> None:
    from sklearn.datasets import load_digits

    images = load_data(DataConfig(), seed=7, canvas=32)
    stored = torch.cat([images.train.images, images.val.images, images.test.images])
    assert stored.shape == (1797, 3, 8, 8)
    expected = torch.from_numpy(load_digits().images) * 255 / 16
    assert stored[:, 0].sum() == expected.round().sum()
    assert stored.max() == 255


def test_digit_splits_depend_on_the_seed_alone() -> None:
    first, again, other = (load_data(DataConfig(), seed, canvas=32) for seed in (7, 7, 9))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.images, other.train.images)


def test_digits_without_a_train_count_train_on_all_that_is_left() -> None:
    images = load_data(DataConfig(train_count=None, val_fraction=0.25), seed=7, canvas=32)
    assert (len(images.train), len(images.val), len(images.test)) == (899, 449, 449)


@pytest.mark.parametrize("settings", [{"train_count": 5}, {"train_count": 1797}, {"train_count": 1796}])
def test_a_train_count_that_leaves_no_image_for_some_class_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"carve_splits: expected .* the digits"):
        load_data(DataConfig(**settings), seed=7, canvas=32)


def test_digits_refuse_another_stored_size() -> None:
    with pytest.raises(ValueError, match=r"expected data\.load_size 0 or 8, got 32"):
        load_data(DataConfig(load_size=32), seed=7, canvas=32)


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'digits', 'dtd', .*'tiny-imagenet'\], got 'cifar'"):
        load_data(DataConfig(name="cifar"), seed=7, canvas=32)


def test_every_data_set_file_is_in_the_registry() -> None:
    listed = ["cifar10", "cifar100", "dtd", "flowers102", "flowers102-coop", "folder", "food101", "imagenet"]
    listed += ["oxford-pets", "stanford-cars", "tiny-imagenet"]
    assert sorted(DATASETS) == sorted([*listed, "digits", "letters"])
    assert sorted(LAYOUTS) == listed


# Splits


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 99), st.data())
def test_every_stretch_of_the_order_is_stratified(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = stratified_order(labels, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    length = data.draw(st.integers(0, len(labels)))
    counts = torch.bincount(labels[order[:length]], minlength=len(sizes))
    shares = torch.tensor(sizes) / len(labels)
    assert ((counts - length * shares).abs() <= 1 + shares * len(sizes) / 2).all()


def test_carved_splits_are_disjoint_and_complete() -> None:
    labels = torch.arange(3).repeat(20)
    parts = carve_splits(labels, (10, 20), 7, "abc", "here")
    assert [len(part) for part in parts] == [10, 20, 30]
    assert torch.cat(parts).sort().values.tolist() == list(range(60))


# An image folder


def test_a_folder_of_classes_is_carved_into_three_splits(root: Path) -> None:
    images = load_folder(root)
    assert (len(images.train), len(images.val), len(images.test)) == (12, 4, 4)
    assert images.class_names == ("cats", "dogs")
    assert images.train.images.shape == (12, 3, 16, 16)
    everything = grey_levels(images.train) + grey_levels(images.val) + grey_levels(images.test)
    assert sorted(everything) == list(range(0, 200, 10))
    assert all(
        (grey >= 100) == label for grey, label in zip(grey_levels(images.val), images.val.labels, strict=True)
    )


def test_folder_splits_depend_on_the_seed_alone(root: Path) -> None:
    first, again, other = (load_folder(root, seed) for seed in (7, 7, 9))
    assert grey_levels(first.train) == grey_levels(again.train)
    assert sorted(grey_levels(first.test)) != sorted(grey_levels(other.test))


def test_given_splits_are_taken_as_they_are(root: Path) -> None:
    for split, grey in (("val", 210), ("test", 220)):
        for name in ("cats", "dogs"):
            write_image(root.parent / "all" / split / name / "a.png", grey)
    root.rename(root.parent / "all" / "train")
    images = load_folder(root.parent / "all")
    assert grey_levels(images.train) == list(range(0, 200, 10))
    assert grey_levels(images.val) == [210, 210]
    assert grey_levels(images.test) == [220, 220]


def test_a_missing_validation_folder_is_carved_from_the_training_images(root: Path) -> None:
    for name in ("cats", "dogs"):
        write_image(root.parent / "all" / "test" / name / "a.png", 220)
    root.rename(root.parent / "all" / "train")
    images = load_folder(root.parent / "all")
    assert (len(images.train), len(images.val), len(images.test)) == (16, 4, 2)


def test_load_size_sets_the_stored_size(root: Path) -> None:
    assert load_folder(root, load_size=20).val.images.shape == (4, 3, 20, 20)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "gif"), ("1", "png"), ("RGBA", "webp"), ("CMYK", "tiff")]
)
def test_images_of_any_colour_mode_become_rgb(root: Path, mode: str, suffix: str) -> None:
    write_image(root / "cats" / f"white.{suffix}", 255, mode)
    images = load_folder(root)
    everything = grey_levels(images.train) + grey_levels(images.val) + grey_levels(images.test)
    assert sorted(everything)[-1] == 255


def test_nested_and_hidden_files_are_handled_as_users_expect(root: Path) -> None:
    write_image(root / "cats" / "more" / "x.JPG", 205)
    (root / "cats" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    images = load_folder(root)
    assert len(images.train) + len(images.val) + len(images.test) == 21


def test_a_link_to_nothing_and_a_folder_named_as_an_image_are_refused_by_name(root: Path) -> None:
    (root / "cats" / "lost.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match=r"train lacks 1 of 21 files: cats/lost\.png .*vpns data check"):
        load_folder(root)
    (root / "cats" / "lost.png").unlink()
    (root / "dogs" / "album.png").mkdir()
    with pytest.raises(ValueError, match=r"train lacks 1 of 21 files: dogs/album\.png"):
        load_folder(root)


def test_files_that_systems_leave_are_no_images(root: Path) -> None:
    (root / "cats" / "._1.png").write_bytes(b"resource fork")
    images = load_folder(root)
    assert len(images.train) + len(images.val) + len(images.test) == 20


def test_selections_stay_on_disk_until_they_are_read(root: Path) -> None:
    images = load_folder(root)
    store = images.train.store
    assert len(store) == 20
    assert images.val.store is store
    assert images.train.select(torch.arange(3)).store is store
    assert images.train.larger is not None
    assert images.train.larger.shape == (20, 3, 18, 18)
    assert images.train.images_for(16).shape == (12, 3, 16, 16)
    assert images.train.images_for(18).shape == (12, 3, 18, 18)
    assert images.train.to("cpu") is images.train
    moved = images.train.to("meta")
    assert (moved.store.shape, moved.rows) == ((12, 3, 16, 16), None)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected an image folder, got {tmp_path / 'gone'}"):
        load_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"expected data\.root.* got None"):
        load_data(DataConfig(name="folder"), seed=7, canvas=32)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"at least 2 class folders in {tmp_path}, got \\[\\]"):
        load_folder(tmp_path)


def test_a_single_class_is_refused(root: Path) -> None:
    for path in (root / "dogs").iterdir():
        path.unlink()
    (root / "dogs").rmdir()
    with pytest.raises(ValueError, match=f"at least 2 class folders in {root}, got \\['cats'\\]"):
        load_folder(root)


def test_a_class_without_images_is_refused(root: Path) -> None:
    (root / "eels").mkdir()
    (root / "eels" / "readme.txt").write_text("none yet")
    with pytest.raises(ValueError, match=f"expected images in the class folder {root / 'eels'}, got none"):
        load_folder(root)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_an_image_that_does_not_decode_is_refused_by_name(root: Path, content: bytes) -> None:
    (root / "dogs" / "3.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"expected an image that decodes, got {root / 'dogs' / '3.png'}"):
        load_folder(root)


def test_a_truncated_image_is_refused_by_name(root: Path) -> None:
    path = root / "cats" / "5.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"got {path} .*truncated"):
        load_folder(root)


def test_too_few_images_to_carve_are_refused(root: Path) -> None:
    write_image(root / "eels" / "only.png")
    with pytest.raises(ValueError, match=rf"got none of 'eels' \(1 images\) .* of {root}"):
        load_folder(root)


def test_a_validation_fraction_that_leaves_nothing_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=f"at least one image per split.* {root}"):
        load_folder(root, val_fraction=0.5)


def test_a_test_folder_with_other_classes_is_refused(root: Path) -> None:
    write_image(root.parent / "all" / "test" / "cats" / "a.png")
    root.rename(root.parent / "all" / "train")
    with pytest.raises(ValueError, match=r"test the class folders of the training images, .*\['dogs'\]"):
        load_folder(root.parent / "all")


def test_a_test_folder_without_a_training_folder_is_refused(root: Path) -> None:
    root.rename(root.parent / "test")
    with pytest.raises(ValueError, match=f"expected {root.parent / 'train'} beside {root.parent / 'test'}"):
        load_folder(root.parent)


# Batches


def test_an_image_that_fits_is_only_scaled() -> None:
    images = random_images(5, 24, 24)
    assert torch.equal(make_batch(images, 24), images.float() / 255)


def test_the_test_transform_is_the_antialiased_bilinear_resize() -> None:
    images = random_images(3, 50, 40)
    expected = F.interpolate(images.float() / 255, size=(24, 24), mode="bilinear", antialias=True)
    assert torch.equal(make_batch(images, 24, flip=True, crop=True), expected.clamp(0, 1))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_a_batch_has_the_asked_size_and_range(
    count: int, height: int, width: int, size: int, flip: bool, crop: bool
) -> None:
    batch = make_batch(random_images(count, height, width), size, torch.Generator(), flip, crop)
    assert batch.shape == (count, 3, size, size)
    assert batch.dtype == torch.float32
    assert ((batch >= 0) & (batch <= 1)).all()


def test_every_image_is_cut_at_its_own_place() -> None:
    images = random_images(1, 36, 36).expand(40, -1, -1, -1)
    batch = make_batch(images, 32, torch.Generator().manual_seed(3))
    windows = (images[0] / 255).unfold(1, 32, 1).unfold(2, 32, 1)  # [3, 5, 5, 32, 32]
    windows = windows.permute(1, 2, 0, 3, 4).reshape(25, -1)
    places = (batch.flatten(1)[:, None] == windows).all(2)
    assert places.sum(1).tolist() == [1] * 40
    assert places.any(0).sum() > 12


def test_flips_mirror_about_half_of_the_images() -> None:
    images = random_images(200, 8, 8)
    batch = make_batch(images, 8, torch.Generator().manual_seed(3), flip=True, crop=False)
    plain = images.float() / 255
    mirrored = (batch == plain.flip(3)).flatten(1).all(1)
    kept = (batch == plain).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


def test_a_batch_is_reproduced_by_its_generator_alone() -> None:
    images = random_images(16, 8, 8)
    first = make_batch(images, 24, torch.Generator().manual_seed(5), flip=True)
    torch.manual_seed(99)
    assert torch.equal(make_batch(images, 24, torch.Generator().manual_seed(5), flip=True), first)
    assert not torch.equal(make_batch(images, 24, torch.Generator().manual_seed(6), flip=True), first)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()],
)
def test_images_of_another_kind_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"make_batch: expected uint8 images \[N, 3, H, W\]"):
        make_batch(images, 8)


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="expected size >= 1 pixel, got 0"):
        make_batch(random_images(1, 8, 8), 0)


@pytest.mark.parametrize(
    ("wanted", "is_same"), [("cuda", True), ("cuda:1", True), ("cuda:0", False), ("cpu", False)]
)
def test_what_is_on_a_gpu_is_where_any_gpu_is_asked_for(wanted: str, is_same: bool) -> None:
    assert is_same_device(torch.device("cuda", 1), torch.device(wanted)) == is_same


def test_a_split_refuses_labels_of_another_count_or_type() -> None:
    with pytest.raises(ValueError, match=r"expected int64 labels \[2\], got torch.int64 \[3\]"):
        Split(random_images(2, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        Split(random_images(2, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="expected uint8 images"):
        Split(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
