"""How does a file appear whole or not at all? Written aside, synced, renamed, and the folder synced."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TMP = ".tmp"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda tmp: _write_text(tmp, text))


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    replace_file(path, lambda tmp: _write_text(tmp, text))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file in one step."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda tmp: _save_file(tmp, stored))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError where the file holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"read_json: expected JSON in {path}, got {error} (the file is damaged)") from error
    if not isinstance(content, dict):
        raise ValueError(f"read_json: expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own."""
    if not path.is_file():
        raise FileNotFoundError(f"read_tensors: expected a file, got none at {path}")
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(
            f"read_tensors: expected safetensors in {path}, got {error} (the file is damaged)"
        ) from error


def fingerprint(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file, as manifests hold them."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def make_folder(path: Path) -> None:
    """The folder and its parents; OSError with a reason where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, path) from error


def check_writable(path: Path) -> None:
    """Make the folder of a file that work goes into; OSError with a reason where it cannot be written."""
    make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {path}: it is a folder")
    tmp = path.with_name(path.name + _TMP)
    try:
        tmp.touch()
        tmp.unlink()
    except OSError as error:
        raise _explain(error, path) from error


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Replace a file, in one step, by what `write` puts at the path it is given."""
    tmp = path.with_name(path.name + _TMP)
    try:
        write(tmp)
        with tmp.open("rb") as file:
            os.fsync(file.fileno())
        tmp.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        # Not on success, where the name is gone: a full disk should not stay full of a half-written file.
        tmp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explain(error, path) from error
        raise


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # It reports a full disk as its own type.
        raise OSError(errno.EIO, str(error), str(path)) from error


def _explain(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    return OSError(error.errno, f"cannot write {path}: {reason} (what was saved before stays valid)")
