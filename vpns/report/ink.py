"""How do plots look? Colours that mean the same in all of them, few lines, PNG and SVG that do not change."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpns.files import replace_file

DENSE, SPARSE, UNUSED, ALARM = "#8a9199", "#1f6fb4", "#c6dbef", "#c0392b"
INK, GRID = "#2b2f33", "#e4e7ea"
# Of several series; the first is the sparse network's own.
SERIES = (SPARSE, "#c8641b", "#3f8f4f", "#8757a5", "#b3942b", "#555f68", "#c2547e", "#2a9d9a")
_DPI = 150


def tidy(axis: Axes) -> None:
    """Two quiet edges, nothing before the data."""
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=INK, labelsize=8)


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG by Agg; without the program's version in it, equal figures are equal files."""
    metadata = {"Software": None}
    replace_file(
        path,
        lambda tmp: figure.savefig(tmp, format="png", dpi=_DPI, facecolor="white", metadata=metadata),
    )


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for an HTML page, with text as text; equal figures are equal words.

    Args:
        name: comes before every id, which several figures of a page must not share.
    """
    written = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", facecolor="white", metadata=metadata)
    element = written.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", element)
    # The page says how large: never wider than it is.
    return re.sub(r'<svg ([^>]*?)height="([\d.]+)pt"', r"<svg \1", element, count=1)
