"""How is a report written as markdown? Its sections in order; also tables and numbers of three digits."""

from __future__ import annotations

from collections.abc import Sequence

from vpns.report.blocks import Block, Command, Picture, Section, Table


def render_markdown(sections: Sequence[Section]) -> str:
    """The whole text; pictures are PNG files beside it."""
    parts = []
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [_render(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _render(block: Block) -> str:
    match block:
        case Table(header, rows):
            return to_markdown(header, rows)
        case Picture(name, caption):
            return f"![{name}.png]({name}.png)\n\n*{caption}*"
        case Command(text):
            return f"```\n{text}\n```"
        case _:
            return block


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
