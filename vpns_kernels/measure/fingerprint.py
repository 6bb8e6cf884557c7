"""On what was it measured? The machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vpns_kernels import native

_PACKAGES = ("torch", "numpy", "vpns")
_ENGINES = ("onnxruntime", "openvino", "deepsparse")
_NUMBERS = {"family": "cpu family", "model": "model"}


def fingerprint() -> dict[str, Any]:
    """Plain values that go with every measured figure."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": native.library().isa_list() if native.why_not() is None else [],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES}
        | {name: found for name in _ENGINES if (found := _version(name)) is not None},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **source_state(Path(__file__)),
    }


def cpu_name() -> str:
    """The model name that the system gives, with family and model: a virtual machine may hide all else."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    found = dict(_fields(info.read_text().partition("\n\n")[0]))
    numbers = [f"{key} {found[name]}" for key, name in _NUMBERS.items() if name in found]
    name = found.get("model name") or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """Of the first processor."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def source_state(file: Path) -> dict[str, Any]:
    """Commit of the checkout that a file belongs to, and whether tracked files differ from it; else None.

    An installed copy that merely lies in some checkout (a virtual environment) does not belong to it.
    """
    folder = file.parent
    is_tracked = _git(folder, "ls-files", "--error-unmatch", file.name) is not None
    commit = _git(folder, "rev-parse", "HEAD") if is_tracked else None
    changed = None if commit is None else _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
