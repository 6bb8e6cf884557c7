"""What do several runs look like side by side? Accuracy of each arm, over density, and over time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from vpns.report.arms import Arm
from vpns.report.ink import DENSE, GRID, INK, SERIES, SPARSE, tidy


def draw_comparison(arms: Sequence[Arm]) -> dict[str, Figure]:
    """Plots by name: over density where that differs, over time where it was measured."""
    drawn = {"arms": _draw_arms(arms)}
    if len({arm.runs[0].config.density for arm in arms}) > 1:
        drawn["over_density"] = _draw_over(arms, "weight_density")
    if any(arm.mean("sparse_ms") is not None for arm in arms):
        drawn["over_time"] = _draw_over(arms, "sparse_ms")
    return drawn


def _draw_arms(arms: Sequence[Arm]) -> Figure:
    """A line per arm: its mean, its interval, and every seed."""
    figure = Figure(figsize=(9.0, 1.1 + 0.36 * len(arms)), layout="constrained")
    axis = figure.subplots()
    for place, arm in enumerate(arms):
        values = arm.values("accuracy")
        axis.plot(values, [place] * len(values), "o", color=SPARSE, alpha=0.25, markersize=4)
        if arm.interval is not None:
            axis.plot(arm.interval, (place, place), color=SPARSE, linewidth=2.2, solid_capstyle="butt")
        axis.plot(
            [sum(values) / len(values)], [place], "o", color=SPARSE, markersize=7, markeredgecolor="white"
        )
    dense = [value for arm in arms for value in arm.values("dense_accuracy")]
    axis.axvline(sum(dense) / len(dense), color=DENSE, linewidth=1.2, linestyle="--")
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=8)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_title("test accuracy, % (dashed: dense)", loc="left", fontsize=11, color=INK)
    _finish(axis)
    return figure


def _draw_over(arms: Sequence[Arm], key: str) -> Figure:
    """Mean accuracy over a column that gets better to the left, a line per series."""
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(dict.fromkeys(arm.series for arm in arms)):
        points = [(arm.mean(key), arm.mean("accuracy"), arm.interval) for arm in arms if arm.series == name]
        found = sorted((x, y, around) for x, y, around in points if x is not None and y is not None)
        color = SERIES[number % len(SERIES)]
        label = name if number < len(SERIES) else f"{name} (as above)"
        axis.plot([x for x, *_ in found], [y for _, y, _ in found], "o-", color=color, label=label, lw=1.6)
        for x, _, around in found:
            if around is not None:
                axis.plot((x, x), around, color=color, linewidth=1.4, alpha=0.6)
    _draw_dense(axis, arms, key)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    ticks = sorted({float(f"{x:.2g}") for arm in arms for x in arm.values(key)})
    if len(ticks) <= 8:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    label = {"weight_density": "share of weights kept", "sparse_ms": "time of a batch, ms"}[key]
    axis.set_xlabel(label, color=INK, fontsize=9)
    axis.set_ylabel("test accuracy, %", color=INK, fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=4)
    _finish(axis)
    return figure


def _draw_dense(axis: Axes, arms: Sequence[Arm], key: str) -> None:
    """A line over densities, one point where it costs time."""
    accuracies = [value for arm in arms for value in arm.values("dense_accuracy")]
    accuracy = sum(accuracies) / len(accuracies)
    if key != "sparse_ms":
        axis.axhline(accuracy, color=DENSE, linewidth=1.2, linestyle="--", label="dense")
        return
    times = [value for arm in arms for value in arm.values("dense_ms")]
    axis.plot([sum(times) / len(times)], [accuracy], "s", color=DENSE, markersize=7, label="dense, fastest")


def _finish(axis: Axes) -> None:
    tidy(axis)
    axis.grid(color=GRID, linewidth=0.8)
