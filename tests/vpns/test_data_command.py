"""Does `vpns data` say what is there, what is missing, and with which exit code?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.vpns.small_sets import make_set, write_image
from vpns import cli
from vpns.data.listing import LAYOUTS

Capture = pytest.CaptureFixture[str]


def test_a_whole_set_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    make_set("food-101", tmp_path, monkeypatch)
    make_set("cifar-100-python", tmp_path, monkeypatch)
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    cifar, food = tmp_path / "cifar-100-python", tmp_path / "food-101"
    assert capsys.readouterr().out.splitlines() == [
        f"cifar100: 3 classes, 30 images in train, 6 images in test in {cifar}: whole",
        f"food101: 3 classes, 30 images in train, 12 images in test in {food}: whole",
    ]


def test_everything_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make_set("food-101", tmp_path, monkeypatch)
    home = tmp_path / "food-101" / "images"
    for path in (home / "pie").glob("train[1-5].jpg"):
        path.unlink()
    for index in range(12):
        (home / "tart" / f"train{index}.jpg").write_bytes(b"half")
    (home / "soup" / "test0.jpg").write_bytes((home / "soup" / "test1.jpg").read_bytes()[:300])
    assert cli.main(["data", "check", str(tmp_path)]) == cli.EXIT_ERROR
    out = capsys.readouterr().out
    assert "food101: 3 classes" in out
    assert "incomplete" in out
    assert "train lacks 5 of 30 files: images/pie/train1.jpg" in out
    assert f"got {home / 'tart' / 'train3.jpg'}" in out
    assert "and 1 more images that do not decode" in out
    assert cli.main(["data", "check", str(tmp_path), "--quick"]) == cli.EXIT_ERROR
    assert "decode" not in capsys.readouterr().out


def test_a_set_that_cannot_be_read_is_told_from_those_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make_set("oxford-iiit-pet", tmp_path, monkeypatch)
    make_set("dtd/dtd", tmp_path, monkeypatch)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    assert cli.main(["data", "check", str(tmp_path)]) == cli.EXIT_ERROR
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("whole")
    assert lines[1] == f"oxford-pets: not readable in {tmp_path / 'oxford-iiit-pet'}: incomplete"
    assert "test.txt" in lines[2]


def test_any_folder_of_class_folders_is_an_image_folder(tmp_path: Path, capsys: Capture) -> None:
    for name in ("cats", "dogs"):
        write_image(tmp_path / name / "1.png", 100)
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"folder: 2 classes, 2 images in train in {tmp_path}: whole\n"
    (tmp_path / "eels").mkdir()
    assert cli.main(["data", "check", str(tmp_path)]) == cli.EXIT_ERROR
    assert f"expected images in the class folder {tmp_path / 'eels'}, got none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "gone"], "expected a folder, got gone"),
        (["check", "."], "expected a data set, got nothing known in . (cifar-10-batches-py, "),
        (["check", ".", "--name", "cifra10"], "got 'cifra10'"),
        (["download", "imagenet", "."], "image-net.org"),
        (["check"], "folder"),
        (["delete", "x"], "delete"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *arguments]) == cli.EXIT_ERROR
    printed = capsys.readouterr()
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1


def test_downloads_are_checked_and_a_run_downloads_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fetch(root: Path) -> None:
        make_set("food-101", root, monkeypatch)

    layout = replace(LAYOUTS["food101"], download=fetch)
    monkeypatch.setitem(LAYOUTS, "food101", layout)
    assert cli.main(["data", "download", "food101", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out.endswith("whole\n")
    monkeypatch.setitem(LAYOUTS, "food101", layout)
    options = ["pretrain", str(tmp_path / "run"), "--data.name=food101", f"--data.root={tmp_path / 'other'}"]
    options.append("--pretrain.epochs=0")
    few = ["--model.source_classes=2"]
    # A head of too few classes is found before anything is decoded.
    assert cli.main([*options, *few]) == cli.EXIT_ERROR
    assert "expected at most 2 target classes" in capsys.readouterr().err
    options += ["--model.source_classes=200"]
    assert cli.main(options) == cli.EXIT_ERROR
    assert "--download fetches it" in capsys.readouterr().err
    # The set arrives; that a head of two classes cannot tell three apart is found after it.
    assert cli.main([*options, *few, "--download"]) == cli.EXIT_ERROR
    assert "expected at most 2 target classes" in capsys.readouterr().err
    assert (tmp_path / "other" / "food-101" / "meta" / "train.json").is_file()
