"""What does a bench report look like? Speed-up over density, a panel for each network, size and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Cell = dict[str, Any]


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Write a picture; the suffix tells the format."""
    cells = report["cells"]
    places = list(dict.fromkeys((c["model"], c["size"], c["batch"]) for c in cells))
    figure = Figure(figsize=(1.0 + 4.2 * len(places), 3.6), layout="constrained")
    axes = figure.subplots(1, len(places), squeeze=False)[0]
    for axis, place in zip(axes, places, strict=True):
        mine = [c for c in cells if (c["model"], c["size"], c["batch"]) == place]
        _draw_panel(axis, mine)
        axis.set_title(f"{place[0]}, {place[1]} px, batch {place[2]}")
    axes[0].set_ylabel("best dense / sparse")
    figure.savefig(path)


def _draw_panel(axis: Axes, cells: list[Cell]) -> None:
    for pattern in dict.fromkeys(cell["pattern"] for cell in cells):
        mine = sorted((c for c in cells if c["pattern"] == pattern), key=lambda cell: cell["density"])
        densities = [cell["density"] for cell in mine]
        middle = [cell["speedup"] for cell in mine]
        below = [c["speedup"] - c["speedup_low"] for c in mine]
        above = [c["speedup_high"] - c["speedup"] for c in mine]
        errors = [[max(0.0, e) for e in below], [max(0.0, e) for e in above]]
        axis.errorbar(densities, middle, yerr=errors, marker="o", markersize=4, capsize=3, label=pattern)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="kept fraction", xscale="log")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
