"""Speed-up over density, one line per layer, one panel per pattern: what a report's rows look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_speedups(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a picture of the first batch's rows; the suffix tells the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["asked"] != "auto"]
    if not rows:
        return
    rows = [row for row in rows if row["batch"] == rows[0]["batch"]]
    panels = sorted({(row["dtype"], row["pattern"]) for row in rows})
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(4 * columns, 3.2 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    layers = sorted({f"{row['network']} {row['layer']}" for row in rows})
    colours = dict(
        zip(layers, pyplot.get_cmap("viridis")([i / len(layers) for i in range(len(layers))]), strict=True)
    )
    for axis, (dtype, pattern) in zip(axes.flat, panels, strict=False):
        for layer, colour in colours.items():
            mine = sorted(
                (row["density"], row["speedup"])
                for row in rows
                if (row["dtype"], row["pattern"], f"{row['network']} {row['layer']}")
                == (dtype, pattern, layer)
            )
            if mine:
                axis.plot(*zip(*mine, strict=True), marker="o", markersize=3, color=colour, label=layer)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{pattern}, {dtype}")
    for axis in axes[-1]:
        axis.set_xlabel("kept fraction")
    for axis in axes[:, 0]:
        axis.set_ylabel("best dense / sparse")
    figure.suptitle(f"batch {rows[0]['batch']}")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=6)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _name(row: dict[str, Any]) -> str:
    return f"{row['network']} {row['layer']}"
