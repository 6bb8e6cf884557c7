"""What stands beside every table: the file it is made of, and where and when that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def link(path: Path) -> str:
    """From the repository's root."""
    return f"[{path.name}](bench/results/{path.name})"


def where(fingerprint: dict[str, Any]) -> str:
    """Date and machine."""
    isa = fingerprint["isa"][-1].upper()
    return f"{fingerprint['date']}, {fingerprint['cpu']}, {isa}, {fingerprint['threads']} threads"
