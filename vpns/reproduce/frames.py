"""Experiment 2: a wider frame, 16 to 64 of 224 pixels, with its parameters, time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vpns.config import PromptConfig, RunConfig
from vpns.report.arms import Arm, Run, group_arms
from vpns.report.blocks import Section, Table
from vpns.reproduce.experiment import Comparison, DottedSettings, Experiment, Row, scale_frame

PAPER_FRAMES = (16, 32, 48, 64)


def build_axes(config: RunConfig) -> DottedSettings:
    """The paper's frames, on the run's canvas."""
    frames = dict.fromkeys(scale_frame(config, frame) for frame in PAPER_FRAMES)
    return {"prompt.frame": list(frames)}


def compare(arms: Sequence[Arm]) -> list[Comparison]:
    """Every frame against the narrowest, which is the paper's choice."""
    return [Comparison(arms[0].name, arm.name) for arm in arms[1:]]


def count_parameters(prompt: PromptConfig) -> int:
    """Pixels of the frame, in three colours."""
    inside = prompt.canvas - 2 * prompt.frame
    return 3 * (prompt.canvas**2 - inside**2)


def tabulate(runs: Sequence[Run]) -> list[Row]:
    """What a frame costs: means over its seeds."""
    rows = []
    for arm in group_arms(runs):
        prompt = arm.runs[0].config.prompt
        own: Row = {"frame": prompt.frame, "of_canvas": prompt.canvas, "parameters": count_parameters(prompt)}
        columns = ("accuracy", "train_seconds", "ms_per_update", "peak_mib")
        rows.append(own | {key: _mean(arm, key) for key in columns})
    return rows


def tell(rows: Sequence[Row]) -> Section:
    """The table for people."""
    header = ("frame", "parameters", "accuracy, %", "training, s", "ms per update", "peak memory, MiB")
    shown = [
        (
            f"{row['frame']} of {row['of_canvas']} px",
            f"{row['parameters']:,}",
            f"{row['accuracy']:.2f}",
            *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("train_seconds", "ms_per_update")),
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        )
        for row in rows
    ]
    told = (
        "Means over seeds. Training is search and tune, as long as they took beside whatever else ran; "
        "memory is the most that a run's process took beyond what it had imported."
    )
    return Section("What a frame costs", (Table(header, shown), told))


def _mean(arm: Arm, key: str) -> float | None:
    values = [run.row[key] for run in arm.runs if run.row.get(key) is not None]
    return statistics.fmean(values) if values else None


EXP2 = Experiment(
    name="exp2",
    title="The width of the frame",
    question="What does a wider frame gain, and what does it cost?",
    embedded={"pattern": "unstructured", "density": 0.1, "search.epochs": 30, "tune.epochs": 15},
    seeds=3,
    build_axes=build_axes,
    until="eval",
    compare=compare,
    tabulate=tabulate,
    tell=tell,
)
