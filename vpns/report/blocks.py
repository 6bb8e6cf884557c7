"""What is a report made of? Sections of text, tables and pictures, before they are markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is text, others are numbers unless their heading ends with a space."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Picture:
    """A plot by its name, which is that of its file, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Command:
    """What to type."""

    text: str


# Text may hold **bold** and [links](file) to files beside the report, and no other markup.
Block = str | Table | Picture | Command


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Args:
        level: 1 for the whole report, 2 for its parts, 3 within them.
    """

    title: str
    blocks: Sequence[Block]
    level: int = 2
