"""What does a run look like? Plots, drawn from the tables of the report's folder and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vpns.files import read_tensors, replace_file
from vpns.report.tables import read_table

Row = dict[str, str]
_DENSE, _SPARSE, _UNUSED, _ALARM = "#8a9199", "#1f6fb4", "#c6dbef", "#c0392b"
_INK, _GRID = "#2b2f33", "#e4e7ea"
_DPI = 150
_BAR_INCHES = 0.3


def draw_plots(folder: Path) -> list[str]:
    """Draw what the folder has data for; returns the names of the PNG files."""
    plots: dict[str, Callable[[Path], Figure | None]] = {
        "curves.png": draw_curves,
        "prompt.png": draw_prompt,
        "density.png": draw_density,
        "times.png": draw_times,
    }
    drawn = []
    for name, draw in plots.items():
        figure = draw(folder)
        if figure is not None:
            _save(figure, folder / name)
            drawn.append(name)
    return drawn


def draw_curves(folder: Path) -> Figure | None:
    """Loss and accuracy over the epochs, a column for each stage; None where no epoch was trained."""
    rows = read_table(folder / "curves.csv")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    if not stages:
        return None
    best = {row["stage"]: row["best_epoch"] for row in read_table(folder / "training.csv")}
    figure = Figure(figsize=(1.2 + 2.5 * len(stages), 5.2), layout="constrained")
    axes = figure.subplots(2, len(stages), sharex="col", sharey="row", squeeze=False)
    for column, stage in enumerate(stages):
        chosen = [row for row in rows if row["stage"] == stage]
        _draw_stage(axes[0, column], axes[1, column], chosen, best.get(stage, ""))
        axes[0, column].set_title(stage, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("accuracy, %")
    axes[1, 0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw_stage(loss: Axes, accuracy: Axes, rows: Sequence[Row], best_epoch: str) -> None:
    epochs = [int(row["epoch"]) for row in rows]
    marker = "o" if len(rows) == 1 else None
    validation = [float(row["accuracy"]) for row in rows]
    trained = [float(row["train_accuracy"]) for row in rows]
    loss.plot(epochs, [float(row["loss"]) for row in rows], color=_INK, linewidth=1.6, marker=marker)
    accuracy.plot(epochs, trained, color=_DENSE, linewidth=1.2, marker=marker, label="training")
    accuracy.plot(epochs, validation, color=_SPARSE, linewidth=1.8, marker=marker, label="validation")
    if best_epoch and int(best_epoch) in epochs:
        epoch = int(best_epoch)
        value = validation[epochs.index(epoch)]
        label = "best, kept"
        accuracy.plot(
            [epoch], [value], "o", color=_SPARSE, markersize=6, markeredgecolor="white", label=label
        )
        accuracy.set_title(f"best {value:.1f}", loc="right", color=_SPARSE, fontsize=9)
    accuracy.set_xlabel("epoch")
    accuracy.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axis in (loss, accuracy):
        _tidy(axis)
        axis.grid(color=_GRID, linewidth=0.8)


def draw_prompt(folder: Path) -> Figure | None:
    """The learned prompt beside an image without and with it; None where the run has no prompt."""
    path = folder / "prompt.safetensors"
    if not path.exists():
        return None
    pictures = read_tensors(path)
    # A prompt that has learned a little still shows, and the title says how much it was stretched.
    change = pictures["prompt"] - 0.5
    stretch = 0.5 / float(change.abs().max().clamp_min(1 / 255))
    pictures["prompt"] = 0.5 + change * stretch
    titles = {
        "prompt": f"learned prompt, contrast x{stretch:.3g}",
        "image": "image without it",
        "prompted": "image with it",
    }
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        axis.imshow(pictures[key].permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=10, color=_INK)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def draw_density(folder: Path) -> Figure:
    """The share of weights that each layer keeps, first layer on top."""
    rows = read_table(folder / "density.csv")
    kept = sum(int(row["kept"]) for row in rows) / sum(int(row["weights"]) for row in rows)
    shares = [100 * float(row["weight_density"]) for row in rows]
    figure = Figure(figsize=(7.6, 1.2 + _BAR_INCHES * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(rows)), shares, height=0.7, color=_SPARSE)
    for place, share in enumerate(shares):
        is_empty = share == 0
        text = "0: empty" if is_empty else f"{share:.3g}"
        _label(axis, share, place, text, _ALARM if is_empty else _INK)
    axis.axvline(100 * kept, color=_DENSE, linewidth=1.2, linestyle="--")
    axis.set_title(
        f"weights kept per layer, % (dashed: whole network, {100 * kept:.3g})", loc="left", fontsize=11
    )
    _list_layers(axis, [row["layer"] for row in rows])
    axis.set_xlim(0, 1.12 * max(*shares, 100 * kept))
    return figure


def draw_times(folder: Path) -> Figure | None:
    """Dense and sparse time of each layer, a column for each image size; None where no layer was timed."""
    rows = read_table(folder / "layers.csv")
    sizes = list(dict.fromkeys(row["image_size"] for row in rows))
    if not sizes:
        return None
    groups = [[row for row in rows if row["image_size"] == size] for size in sizes]
    height = 1.4 + 1.25 * _BAR_INCHES * max(map(len, groups))
    figure = Figure(figsize=(1.6 + 4.4 * len(sizes), height), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(sizes), squeeze=False)[0], groups, strict=True):
        _draw_layer_times(axis, group)
    meaning = {"dense": _DENSE, "sparse": _SPARSE, "sparse, no gain: runs dense": _UNUSED}
    handles = [Patch(color=color, label=label) for label, color in meaning.items()]
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside upper right", ncols=3)
    return figure


def _draw_layer_times(axis: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    dense, sparse = ([float(row[key] or 0) for row in rows] for key in ("dense_ms", "sparse_ms"))
    is_used = [row["choice"] == "sparse" for row in rows]
    axis.barh([place - 0.2 for place in places], dense, height=0.38, color=_DENSE)
    colors = [_SPARSE if used else _UNUSED for used in is_used]
    axis.barh([place + 0.2 for place in places], sparse, height=0.38, color=colors)
    for place, row in enumerate(rows):
        if row["speedup"]:
            text = f"{float(row['speedup']):.2f}x"
            _label(axis, max(dense[place], sparse[place]), place, text, _INK if is_used[place] else _DENSE)
    axis.set_title(f"{rows[0]['image_size']} px: ms per layer, and speedup", loc="left", fontsize=11)
    _list_layers(axis, [row["layer"] for row in rows])
    axis.set_xlim(0, 1.18 * max(*dense, *sparse))


def _list_layers(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    _tidy(axis)
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    axis.tick_params(axis="y", length=0)


def _label(axis: Axes, x: float, y: float, text: str, color: str) -> None:
    """Right of a bar's end; on white, so that no line runs through it."""
    place, box = (4, 0), {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axis.annotate(
        text, (x, y), place, textcoords="offset points", va="center", fontsize=8, color=color, bbox=box
    )


def _tidy(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GRID)
    axis.tick_params(colors=_INK, labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    """As PNG, by Agg; without the program's version in it, equal figures are equal files."""
    metadata = {"Software": None}
    replace_file(
        path,
        lambda tmp: figure.savefig(tmp, format="png", dpi=_DPI, facecolor="white", metadata=metadata),
    )
