"""Where are decoded images kept? In one memory-mapped file per split and size, decoded once.

The file's name holds a digest of what it was made from: each image's path, size, and times of last
modification and of last change. Reading the contents instead would cost minutes for large sets. The time of
change comes from the system's clock and cannot be set back, so that an image which was exchanged for another
of the same size and date is seen; what was only touched is decoded again. A file appears by one rename, and
one process decodes while others wait for it; a file that was replaced stays readable for who has mapped it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from vpns.data.decode import read_image
from vpns.files import make_folder, replace_file

_CHUNK = 256
# Counted up where the same file comes to be decoded to other pixels.
_DECODING = 2


def open_decoded(files: Sequence[Path], sides: tuple[int, ...], folder: Path, hint: str = "") -> list[Tensor]:
    """The images in each size, mapped: uint8 [N, 3, side, side].

    Args:
        folder: of this split alone; what it holds of an earlier content is removed.
        hint: how to look for more, should an image not decode.
    """
    digest = _digest(files)
    path = folder / f"{digest}-{'-'.join(map(str, sides))}.npy"
    make_folder(folder)
    with _lock(folder):
        if _map(path, len(files), sides) is None:
            _check_space(len(files), sides, folder)
            replace_file(path, lambda tmp: _decode(files, sides, tmp, hint))
            for other in folder.glob("*.npy*"):
                if not other.name.startswith(digest):
                    other.unlink()
        mapped = _map(path, len(files), sides)
    assert mapped is not None
    parts = torch.from_numpy(mapped).split([3 * side * side for side in sides], 1)
    return [part.unflatten(1, (3, side, side)) for part, side in zip(parts, sides, strict=True)]


def cache_folder(given: str | None) -> Path:
    """Where data.cache says, or else $VPNS_CACHE, or the user's own cache."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpns"
    return Path(given or os.environ.get("VPNS_CACHE") or users)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{PIL.__version__} {_DECODING}".encode())
    for file in files:
        found = file.stat()
        digest.update(f"{file}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _map(path: Path, count: int, sides: tuple[int, ...]) -> np.ndarray | None:
    """One row per image, its sizes side by side; None where that is not there, or not whole."""
    try:
        # Copy on write: what is mapped looks writable, as torch wants it, and the file stays as it is.
        rows: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return rows if rows.shape == (count, _row_bytes(sides)) and rows.dtype == np.uint8 else None


def _row_bytes(sides: tuple[int, ...]) -> int:
    return sum(3 * side * side for side in sides)


def _check_space(count: int, sides: tuple[int, ...], folder: Path) -> None:
    needed, free = count * _row_bytes(sides), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"open_decoded: expected {needed / 2**30:.1f} GiB of free space in {folder} for {count:,} "
            f"decoded images, got {free / 2**30:.1f} GiB "
            "(data.cache names another folder, data.load_size a smaller side)"
        )


def _decode(files: Sequence[Path], sides: tuple[int, ...], path: Path, hint: str) -> None:
    """Write every image in every size."""
    shape = (len(files), _row_bytes(sides))
    # Written, not mapped: a disk that fills up is then an error, not the end of the process.
    with path.open("wb") as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        try:
            for first in range(0, len(files), _CHUNK):
                # Pillow decodes without Python's lock; the threads are those that the run may use.
                for image in pool.map(lambda one: read_image(one, sides), files[first : first + _CHUNK]):
                    file.writelines(pixels.tobytes() for pixels in image)
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time; the lock falls with the process, however it ends."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
