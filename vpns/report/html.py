"""How is a report written as HTML? One file that needs no other, no network and no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from vpns.report.blocks import Block, Command, Picture, Section, Table
from vpns.report.ink import to_svg

_SENTENCE = 40
_BOLD = re.compile(r"\*\*(.+?)\*\*")
# Files beside the report, and nothing that a browser would run.
_LINK = re.compile(r"\[([^\[\]]+)\]\(((?:\.\./)*[\w-][\w./-]*\.[a-z]+)\)")


def render_html(sections: Sequence[Section], plots: Mapping[str, Figure]) -> str:
    """The whole page; every word that comes from outside is escaped.

    Args:
        plots: the figures that the sections name.
    """
    environment = Environment(
        loader=PackageLoader("vpns.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _render_prose
    environment.filters["slug"] = lambda title: re.sub(r"\W+", "-", title.lower()).strip("-")
    environment.tests |= {
        "table": _is_a(Table),
        "tall": _is_tall,
        "picture": _is_a(Picture),
        "command": _is_a(Command),
    }
    pictures = {name: Markup(to_svg(figure, name)) for name, figure in plots.items()}
    page = environment.get_template("page.html.jinja")
    return page.render(head=sections[0], sections=sections[1:], pictures=pictures) + "\n"


def _render_prose(text: object) -> Markup:
    """Bold and links, of text that is escaped first."""
    safe = str(escape(str(text)))
    safe = _LINK.sub(r'<a href="\2">\1</a>', safe)
    return Markup(_BOLD.sub(r"<strong>\1</strong>", safe))


def _is_tall(table: Table) -> bool:
    """Whether it has a column of sentences, which a narrow screen shows below the other cells."""
    return len(table.header) > 4 and any(len(str(cell)) > _SENTENCE for row in table.rows for cell in row[1:])


def _is_a(kind: type) -> Callable[[Block], bool]:
    def test(block: Block) -> bool:
        return isinstance(block, kind)

    return test
