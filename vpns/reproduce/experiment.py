"""What is an experiment? A grid that is fixed beforehand, the comparisons it is for, and its own table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vpns.config import RunConfig
from vpns.report.arms import Arm, Run
from vpns.report.blocks import Section

DottedSettings = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two arms, by name; the second is hoped to be better.

    Args:
        is_primary: the one that the experiment is made for; all others only explain it.
    """

    first: str
    second: str
    is_primary: bool = False


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper, or of ours.

    Args:
        embedded: settings of its runs on letters → digits.
        seeds: how many by itself.
        build_axes: the grid but for its seeds, from the settings of its runs.
        until: the last stage of a run; of those of the first seed alone where runs are timed: other seeds
            keep as many channels in much the same layers, and timing takes longer than training here.
        compare: what is compared, of the arms that there are.
        wanted_points: the true difference that its seeds are to find four times out of five.
        tabulate: a row for each run, or arm, of what the comparison does not tell, for `tell` to show.
    """

    name: str
    title: str
    question: str
    embedded: DottedSettings
    seeds: int
    build_axes: Callable[[RunConfig], DottedSettings]
    until: str
    compare: Callable[[Sequence[Arm]], Sequence[Comparison]]
    wanted_points: float | None = None
    tabulate: Callable[[Sequence[Run]], Sequence[Row]] | None = None
    tell: Callable[[Sequence[Row]], Section] | None = None


def pair_by_density(arms: Sequence[Arm], first: str, second: str) -> list[Comparison]:
    """Two series at every density that both have."""
    by_name = {(arm.series, arm.density): arm.name for arm in arms}
    return [
        Comparison(by_name[first, arm.density], arm.name, is_primary=True)
        for arm in arms
        if arm.series == second and (first, arm.density) in by_name
    ]


def keep_existing(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Comparison]:
    """Those whose arms have been tested."""
    names = {arm.name for arm in arms}
    return [one for one in comparisons if {one.first, one.second} <= names]


def scale_frame(config: RunConfig, frame: int) -> int:
    """A frame of the paper's canvas of 224 pixels on the run's own."""
    return max(1, round(frame * config.prompt.canvas / 224))
