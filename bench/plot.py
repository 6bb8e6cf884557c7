"""What a report's rows look like: speed-up over density by layer, time per image of training iterations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# At which iterations are shown over the batch.
_DENSITY = 0.1


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


def plot_iterations(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a picture of time per image over density and over batch, a line of panels for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r.get("iteration") and (r["start"], r["prompt_in"]) == ("uniform", "both")]
    rows = [row for row in rows if row["variant"] == "framed"]
    if not rows:
        return
    stages = sorted({row["stage"] for row in rows})
    batch = Counter(row["batch"] for row in rows).most_common(1)[0][0]
    figure, axes = pyplot.subplots(
        len(stages), 2, figsize=(9, 3.4 * len(stages)), squeeze=False, layout="constrained"
    )
    forms = sorted({_form(row) for row in rows})
    colours = pyplot.get_cmap("tab10")
    for line, stage in enumerate(stages):
        over_density, over_batch = axes[line]
        for number, form in enumerate(forms):
            mine = [row for row in rows if (row["stage"], _form(row)) == (stage, form)]
            style = {"color": colours(number % 10), "label": form, "marker": "o", "markersize": 3}
            same_batch = sorted((r["density"], r["ms_per_image"]) for r in mine if r["batch"] == batch)
            if mine and mine[0]["who"] != "ours":
                for _, time_ms in same_batch[:1]:
                    over_density.axhline(time_ms, color=style["color"], linewidth=0.8, linestyle="--")
            elif same_batch:
                over_density.plot(*zip(*same_batch, strict=True), **style)
            same_density = sorted((r["batch"], r["ms_per_image"]) for r in mine if r["density"] == _DENSITY)
            if same_density:
                over_batch.plot(*zip(*same_density, strict=True), **style)
        over_density.set(xscale="log", xlabel="kept fraction", title=f"{stage}, batch {batch}")
        over_batch.set(xscale="log", xlabel="batch", title=f"{stage}, density {_DENSITY:g}")
        over_density.set_ylabel("ms per image")
    handles = {}
    for axis in axes.flat:
        axis.set_yscale("log")
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=6)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _form(row: dict[str, Any]) -> str:
    words = [row["who"], row["pattern"]] if row["who"] == "ours" else [row["who"]]
    return " ".join([*words, row["dtype"]])
