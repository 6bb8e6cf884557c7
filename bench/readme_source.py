"""What stands beside every table: the file it is made of, and where and when that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def link(path: Path) -> str:
    """From the repository's root."""
    return f"[{path.name}](bench/results/{path.name})"


def where(fingerprint: dict[str, Any]) -> str:
    """Date, machine and commit."""
    machine = f"{fingerprint['date']}, {fingerprint['cpu']}, {threads_of(fingerprint)}"
    return f"{machine}, commit {fingerprint['commit'][:7]}"


def threads_of(fingerprint: dict[str, Any]) -> str:
    """The strongest instruction set, and how many threads ran."""
    return f"{fingerprint['isa'][-1].upper()}, {fingerprint['threads']} threads"
