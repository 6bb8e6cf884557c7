"""What does a run look like? Plots, drawn from the tables of the report's folder and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vpns.files import read_tensors
from vpns.report.ink import ALARM, DENSE, GRID, INK, SPARSE, UNUSED, save_png, tidy
from vpns.report.tables import read_table

Row = dict[str, str]
_BAR_INCHES = 0.3


def draw_plots(folder: Path) -> dict[str, Figure]:
    """Draw what the folder has data for, by name, and write each as PNG."""
    plots: dict[str, Callable[[Path], Figure | None]] = {
        "curves": draw_curves,
        "prompt": draw_prompt,
        "density": draw_density,
        "times": draw_times,
    }
    drawn = {name: figure for name, draw in plots.items() if (figure := draw(folder)) is not None}
    for name, figure in drawn.items():
        save_png(figure, folder / f"{name}.png")
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
        axes[0, column].set_title(stage, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("accuracy, %")
    axes[1, 0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw_stage(loss: Axes, accuracy: Axes, rows: Sequence[Row], best_epoch: str) -> None:
    epochs = [int(row["epoch"]) for row in rows]
    marker = "o" if len(rows) == 1 else None
    validation = [float(row["accuracy"]) for row in rows]
    trained = [float(row["train_accuracy"]) for row in rows]
    loss.plot(epochs, [float(row["loss"]) for row in rows], color=INK, linewidth=1.6, marker=marker)
    accuracy.plot(epochs, trained, color=DENSE, linewidth=1.2, marker=marker, label="training")
    accuracy.plot(epochs, validation, color=SPARSE, linewidth=1.8, marker=marker, label="validation")
    if best_epoch and int(best_epoch) in epochs:
        epoch = int(best_epoch)
        value = validation[epochs.index(epoch)]
        label = "best, kept"
        accuracy.plot([epoch], [value], "o", color=SPARSE, markersize=6, markeredgecolor="white", label=label)
        accuracy.set_title(f"best {value:.1f}", loc="right", color=SPARSE, fontsize=9)
    accuracy.set_xlabel("epoch")
    accuracy.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axis in (loss, accuracy):
        tidy(axis)
        axis.grid(color=GRID, linewidth=0.8)


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
        axis.set_title(title, fontsize=10, color=INK)
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
    axis.barh(range(len(rows)), shares, height=0.7, color=SPARSE)
    for place, share in enumerate(shares):
        is_empty = share == 0
        text = "0: empty" if is_empty else f"{share:.3g}"
        _label(axis, share, place, text, ALARM if is_empty else INK)
    axis.axvline(100 * kept, color=DENSE, linewidth=1.2, linestyle="--")
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
    meaning = {"dense": DENSE, "sparse": SPARSE, "sparse, no gain: runs dense": UNUSED}
    handles = [Patch(color=color, label=label) for label, color in meaning.items()]
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside upper right", ncols=3)
    return figure


def _draw_layer_times(axis: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    dense, sparse = ([float(row[key] or 0) for row in rows] for key in ("dense_ms", "sparse_ms"))
    is_used = [row["choice"] == "sparse" for row in rows]
    axis.barh([place - 0.2 for place in places], dense, height=0.38, color=DENSE)
    colors = [SPARSE if used else UNUSED for used in is_used]
    axis.barh([place + 0.2 for place in places], sparse, height=0.38, color=colors)
    for place, row in enumerate(rows):
        if row["speedup"]:
            text = f"{float(row['speedup']):.2f}x"
            _label(axis, max(dense[place], sparse[place]), place, text, INK if is_used[place] else DENSE)
    axis.set_title(f"{rows[0]['image_size']} px: ms per layer, and speedup", loc="left", fontsize=11)
    _list_layers(axis, [row["layer"] for row in rows])
    axis.set_xlim(0, 1.18 * max(*dense, *sparse))


def _list_layers(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    tidy(axis)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.tick_params(axis="y", length=0)


def _label(axis: Axes, x: float, y: float, text: str, color: str) -> None:
    """Right of a bar's end; on white, so that no line runs through it."""
    place, box = (4, 0), {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axis.annotate(
        text, (x, y), place, textcoords="offset points", va="center", fontsize=8, color=color, bbox=box
    )
