"""Are images decoded once, again when they change, and never half?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vpns.data import cache
from vpns.data.cache import cache_folder, open_decoded
from vpns.data.decode import read_image

SIDES = (8, 9)
ROOT = Path(__file__).parents[2]
OPEN = (
    "import sys, os\n"
    "from pathlib import Path\n"
    "from vpns.data import cache\n"
    "counts, read = [], cache.read_image\n"
    "def counted(path, sides):\n"
    "    counts.append(path)\n"
    "    if len(counts) == int(sys.argv[3]): os._exit(9)\n"
    "    return read(path, sides)\n"
    "cache.read_image = counted\n"
    "files = sorted(Path(sys.argv[1]).glob('*.bmp'))\n"
    "store = cache.open_decoded(files, (64,), Path(sys.argv[2]))[0]\n"
    "print(len(counts), int(store.sum(dtype=__import__('torch').int64)))\n"
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five images of noise, of a format in which equal sides make files of equal size."""
    return [write_noise(tmp_path / "images" / f"{number}.bmp", number) for number in range(5)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in order."""
    found: list[Path] = []

    def counted(path: Path, sides: tuple[int, ...]) -> list[np.ndarray]:
        found.append(path)
        return read_image(path, sides)

    monkeypatch.setattr(cache, "read_image", counted)
    return found


def write_noise(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_images_are_those_that_pillow_decodes_in_every_size(files: list[Path], tmp_path: Path) -> None:
    stores = open_decoded(files, SIDES, tmp_path / "cache")
    assert [list(store.shape) for store in stores] == [[5, 3, 8, 8], [5, 3, 9, 9]]
    for number, file in enumerate(files):
        for store, expected in zip(stores, read_image(file, SIDES), strict=True):
            assert torch.equal(store[number], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_of_sixteen_bits_the_upper_eight_count(suffix: str, tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(levels).save(path)
    (pixels,) = read_image(path, (8,))
    assert (pixels == levels // 256).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"8 or 16 bits, got Pillow's mode F"):
        read_image(tmp_path / "float.tif", (8,))


def test_the_second_time_nothing_is_decoded(files: list[Path], tmp_path: Path, decoded: list[Path]) -> None:
    first = open_decoded(files, SIDES, tmp_path / "cache")
    again = open_decoded(files, SIDES, tmp_path / "cache")
    assert len(decoded) == 5
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_is_changed_in_memory_stays_as_it_is_on_disk(files: list[Path], tmp_path: Path) -> None:
    (store,) = open_decoded(files, (8,), tmp_path / "cache")
    kept = store.clone()
    store.zero_()
    assert torch.equal(open_decoded(files, (8,), tmp_path / "cache")[0], kept)


def test_an_image_exchanged_for_one_of_the_same_size_and_date_is_seen(
    files: list[Path], tmp_path: Path, decoded: list[Path]
) -> None:
    (before,) = open_decoded(files, (8,), tmp_path / "cache")
    found = files[2].stat()
    write_noise(files[2], 99)
    os.utime(files[2], ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (files[2].stat().st_size, files[2].stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    kept = before.clone()
    (after,) = open_decoded(files, (8,), tmp_path / "cache")
    assert len(decoded) == 10
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]
    # What was mapped before stays as it was, though its file is gone.
    assert torch.equal(before, kept)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_other_files_and_other_sizes_are_decoded_anew(
    files: list[Path], tmp_path: Path, decoded: list[Path]
) -> None:
    open_decoded(files, (8,), tmp_path / "cache")
    assert len(open_decoded(files, (9,), tmp_path / "cache")[0]) == 5
    files[4] = files[4].rename(tmp_path / "images" / "6.bmp")
    open_decoded(files, (8,), tmp_path / "cache")
    assert len(open_decoded(files[:4], (8,), tmp_path / "cache")[0]) == 4
    assert len(decoded) == 5 + 5 + 5 + 4


def test_a_file_that_is_not_whole_is_made_again(
    files: list[Path], tmp_path: Path, decoded: list[Path]
) -> None:
    first = open_decoded(files, (8,), tmp_path / "cache")[0].clone()
    (path,) = (tmp_path / "cache").glob("*.npy")
    for content in (path.read_bytes()[:-1], b"", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        assert torch.equal(open_decoded(files, (8,), tmp_path / "cache")[0], first)
    assert len(decoded) == 20


def test_nothing_is_left_of_images_that_do_not_decode(files: list[Path], tmp_path: Path) -> None:
    files[3].write_bytes(b"BM")
    with pytest.raises(ValueError, match=f"expected an image that decodes, got {files[3]} .* look there"):
        open_decoded(files, (8,), tmp_path / "cache", " look there")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_full_disk_is_an_error_and_leaves_nothing(
    files: list[Path], tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    with full_disk(), pytest.raises(OSError, match=f"cannot write {tmp_path / 'cache'}.*too large"):
        open_decoded(files, (64,), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    assert len(open_decoded(files, (64,), tmp_path / "cache")[0]) == 5


def test_too_little_space_is_found_before_anything_is_decoded(
    files: list[Path], tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = type("usage", (), {"free": 3 * 2**20})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0\.2 GiB of free space .* for 5 decoded .* data\.load_size"):
        open_decoded(files, (4096,), tmp_path / "cache")
    assert decoded == []


def test_of_two_processes_one_decodes(files: list[Path], tmp_path: Path) -> None:
    runs = [start(files, tmp_path) for _ in range(2)]
    counts, sums = zip(*(map(int, run.communicate()[0].split()) for run in runs), strict=True)
    assert sorted(counts) == [0, 5]
    assert sums[0] == sums[1] > 0


def test_a_process_killed_while_it_decodes_leaves_nothing_that_counts(
    files: list[Path], tmp_path: Path
) -> None:
    killed = start(files, tmp_path, dies_at=4)
    assert killed.communicate()[0] == ""
    assert killed.returncode == 9
    assert not list((tmp_path / "cache").glob("*.npy"))
    counts, total = map(int, start(files, tmp_path).communicate()[0].split())
    assert (counts, total > 0) == (5, True)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".npy"]


def start(files: list[Path], tmp_path: Path, dies_at: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(files[0].parent), str(tmp_path / "cache"), str(dies_at)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPNS_CACHE", "/there")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder("/given") == Path("/given")
    assert cache_folder(None) == Path("/there")
    monkeypatch.delenv("VPNS_CACHE")
    assert cache_folder(None) == Path("/xdg/vpns")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "vpns"
