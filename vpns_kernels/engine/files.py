"""How does a folder appear, or replace another, whole or not at all? Written aside, synced, swapped by name.

A folder that is not empty cannot be renamed over, so a replacement takes two renames:

    write .<name>.vpns-new, sync it | <name> → .<name>.vpns-old | sync | .<name>.vpns-new → <name> | sync |
    remove .<name>.vpns-old

Wherever that stops, one complete folder is left: <name> itself before the first and after the second
rename, and between them the old one aside. Readers therefore ask `find_folder`; the next writer settles
what it finds before it starts. The old one is removed only once the new one is there after a power cut too.
Writers in one parent folder take turns (flock); readers never wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"


class ArtifactError(ValueError):
    """A folder or file that is no intact artifact; the message names the file and the reason."""


def refuse(path: Path, expected: str, found: object) -> ArtifactError:
    """The error to raise."""
    return ArtifactError(f"read_artifact: expected {expected} in {path}, got {found}")


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a new file; its size and SHA-256, of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_file(path: Path, limit_bytes: int, size: int | None = None) -> Tensor:
    """All bytes of a regular file, in 64-byte aligned memory.

    Args:
        size: refuse any other, before anything is allocated.
    """
    try:
        # Not to wait at a named pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"read_artifact: expected a regular file at {path}, got another kind")
            found = status.st_size
            if found > limit_bytes or (size is not None and found != size):
                expected = f"at most {limit_bytes}" if size is None else str(size)
                raise ArtifactError(f"read_artifact: expected {expected} bytes in {path}, got {found}")
            buffer = _allocate(found, path)
            view, done = buffer.numpy().data, 0
            while done < found and (count := file.readinto(view[done:])):
                done += count
            if done != found or file.read(1):
                raise ArtifactError(
                    f"read_artifact: expected {found} bytes in {path}, got a file that changes"
                )
            return buffer
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"read_artifact: expected a file at {path}, got: {reason}") from error


def replace_folder(folder: Path, check_old: Callable[[Path], None], write: Callable[[Path], None]) -> None:
    """Put what `write` writes into an empty folder in the place of `folder`, in one step.

    Args:
        folder: resolved; parents are made.
        check_old: raises where what stands at `folder` must not be replaced.

    Raises:
        OSError: the system's reason; `folder` is as it was, or new where only the last sync failed.
    """
    _make_parents(folder)
    new, old = _siblings(folder)
    with _take_turns(folder.parent):
        _settle(folder)
        if folder.exists():
            check_old(folder)
        try:
            new.mkdir()
            write(new)
            _sync_folder(new)
            if folder.exists():
                folder.rename(old)
                _sync_folder(folder.parent)
            new.rename(folder)
        finally:
            _settle(folder)


def find_folder(folder: Path) -> Path:
    """The folder; where it is missing and an old one stands aside, that one."""
    old = _siblings(folder)[1]
    return old if not folder.exists() and old.exists() else folder


def _siblings(folder: Path) -> tuple[Path, Path]:
    return tuple(folder.with_name(f".{folder.name}.vpns-{state}") for state in ("new", "old"))  # type: ignore[return-value]


def _settle(folder: Path) -> None:
    """From any state that an interrupted replacement leaves to one complete folder and nothing beside it."""
    new, old = _siblings(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    # What stands at the name must last before what stands aside goes.
    _sync_folder(folder.parent)
    for leftover in (new, old):
        if leftover.exists():
            # Without its manifest a half-removed folder is no artifact.
            (leftover / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(leftover)


@contextmanager
def _take_turns(parent: Path) -> Iterator[None]:
    descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_parents(folder: Path) -> None:
    missing = [parent for parent in folder.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        _sync_folder(parent.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocate(size: int, path: Path) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise ArtifactError(f"read_artifact: expected a {path} that fits memory, got {size} bytes") from error
