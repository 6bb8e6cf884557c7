"""How are values written for people? Tables in markdown, and numbers of three digits."""

from __future__ import annotations

from collections.abc import Sequence


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers unless their heading ends with a space."""
    rule = [":--" if number == 0 or name.endswith(" ") else "--:" for number, name in enumerate(header)]
    lines = [list(header), rule, *rows]
    return "\n".join("| " + " | ".join(_to_cell(cell) for cell in line) + " |" for line in lines)


def _to_cell(cell: object) -> str:
    """One line, and no bar that would end the cell."""
    return " ".join(str(cell).split()).replace("|", "\\|")


def show_number(value: float | None) -> str:
    """Three significant digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"
