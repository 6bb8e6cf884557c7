"""What does a run leave in its folder, so that the same command goes on where it was killed?

A stage that is under way has `stage-inputs.json`, which says what it is built on, and where it trains
`state.json` and the `state-<n>.safetensors` that it names: a new pair is written beside the old one and takes
over in one rename. A finished stage has `stage.json`, written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vpns.files import (
    fingerprint,
    make_folder,
    read_json,
    read_tensors,
    sync_folder,
    write_json,
    write_tensors,
)

SCHEMA_VERSION = 1
_STATE = "state.json"
_MANIFEST = "stage.json"
_INPUTS = "stage-inputs.json"


@dataclass(frozen=True)
class StageRecord:
    """A finished stage: what it found, what it wrote, and what it was built on.

    Args:
        result: plain values for later stages and the report.
        outputs: fingerprint of each file, by its path in the stage's folder.
        inputs: digest of each stage that it needed.
    """

    result: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    inputs: dict[str, str]

    @property
    def digest(self) -> str:
        """Names what the stage wrote; equal for equal outputs."""
        return hashlib.sha256(json.dumps(self.outputs, sort_keys=True).encode()).hexdigest()


def save_state(folder: Path, tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
    """Save where a stage is; a kill at any point leaves the old state or the new one, whole."""
    generation = 1 + max((_generation(path) for path in folder.glob("state-*.safetensors")), default=0)
    path = folder / f"state-{generation}.safetensors"
    write_tensors(path, tensors)
    content = {"schema_version": SCHEMA_VERSION, "tensors": path.name, **fingerprint(path)}
    write_json(folder / _STATE, content | {"position": position})
    _remove_states(folder, keep=path.name)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last saved tensors and position; None before the first.

    Raises:
        ValueError: naming the file, where the tensors are not those that were saved.
    """
    if not (folder / _STATE).exists():
        return None
    content = read_json(folder / _STATE)
    _check_file(folder / content["tensors"], content)
    return read_tensors(folder / content["tensors"]), content["position"]


def begin_stage(folder: Path, inputs: Mapping[str, str]) -> None:
    """Make the stage's folder and write down what it is built on; what was built on other inputs goes.

    Args:
        inputs: digest of each stage that it needs, other ones than a finished record's.
    """
    if (folder / _MANIFEST).exists() or _begun_with(folder) not in (None, inputs):
        shutil.rmtree(folder)
    make_folder(folder)
    write_json(folder / _INPUTS, {"schema_version": SCHEMA_VERSION, "inputs": dict(inputs)})


def _begun_with(folder: Path) -> dict[str, str] | None:
    path = folder / _INPUTS
    found: dict[str, str] | None = read_json(path)["inputs"] if path.exists() else None
    return found


def finish_stage(folder: Path, record: StageRecord) -> None:
    """Declare a stage finished; its state is no longer needed."""
    write_json(folder / _MANIFEST, {"schema_version": SCHEMA_VERSION} | vars(record))
    for name in (_STATE, _INPUTS):
        (folder / name).unlink(missing_ok=True)
    _remove_states(folder)


def read_stage(folder: Path) -> StageRecord | None:
    """The record of a finished stage, every output checked; None where it has not finished.

    Raises:
        ValueError: naming the output that is missing or damaged.
    """
    if not (folder / _MANIFEST).exists():
        return None
    content = read_json(folder / _MANIFEST)
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"read_stage: expected schema_version {SCHEMA_VERSION} in {folder / _MANIFEST}, got {version}"
        )
    record = StageRecord(**content)
    for name, expected in record.outputs.items():
        _check_file(folder / name, expected)
    return record


def list_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Fingerprints of everything in a stage's folder but its own bookkeeping."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if path.parent == folder and path.name.startswith(("state", "stage"))]
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files if path not in own}


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; the lock falls with the process, however it ends."""
    make_folder(folder)
    try:
        descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(error.errno, f"cannot write in the run folder {folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OSError(
            error.errno, f"run folder {folder}: another process works in it (wait for it)"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    hint = f"remove {path.parent} to do that stage again"
    if not path.is_file():
        raise ValueError(f"read_stage: expected the file {path}, got none ({hint})")
    for key, value in fingerprint(path).items():
        if value != expected[key]:
            raise ValueError(
                f"read_stage: expected {key} {expected[key]} of {path}, got {value} (damaged; {hint})"
            )


def _generation(path: Path) -> int:
    number = path.stem.removeprefix("state-")
    return int(number) if number.isdigit() else 0


def _remove_states(folder: Path, keep: str | None = None) -> None:
    for path in folder.glob("state-*"):
        if path.name != keep:
            path.unlink()
    sync_folder(folder)
