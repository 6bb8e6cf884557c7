"""Which runs are the same but for their seed? They are an arm: a mean, an interval, and pairs with others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpns.config import FREE_KEYS, RunConfig, flatten
from vpns.files import read_json
from vpns.report.outcome import Row, describe_run
from vpns.statistics import PairedTest, compare_paired, find_interval

SEED, DENSITY = "seed", "density"


@dataclass(frozen=True)
class Run:
    """A tested run.

    Args:
        choices: in what it differs from the runs that it is compared with, by axis.
        row: what came out of it.
    """

    name: str
    folder: Path
    config: RunConfig
    choices: dict[str, str]
    row: Row

    @property
    def arm(self) -> str:
        """What it is but for its seed."""
        return describe_choices({k: v for k, v in self.choices.items() if k != SEED}) or self.config.method


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    name: str
    runs: Sequence[Run]

    @property
    def series(self) -> str:
        """What it is but for its density."""
        choices = {k: v for k, v in self.runs[0].choices.items() if k not in (SEED, DENSITY)}
        return describe_choices(choices) or self.runs[0].config.method

    @property
    def density(self) -> str | None:
        """The density as it was chosen; None where all arms have the same."""
        return self.runs[0].choices.get(DENSITY)

    def values(self, key: str) -> list[float]:
        """What the runs have of a column."""
        return [float(run.row[key]) for run in self.runs if run.row[key] is not None]

    def mean(self, key: str) -> float | None:
        """The mean of a column over the runs; None where no run has it."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean accuracy; None of a single seed."""
        return find_interval(self.values("accuracy"))


def read_runs(folders: Sequence[Path], choices: Mapping[Path, dict[str, str]] | None = None) -> list[Run]:
    """Runs that have been tested; with their choices, or those settings in which they differ.

    Raises:
        FileNotFoundError: naming a folder without a run, or a run that has not been tested.
    """
    configs = {}
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"report: expected a run folder with run.json, got {folder}")
        if not (folder / "eval" / "stage.json").is_file():
            raise FileNotFoundError(f"report: expected a tested run, got {folder} (run: vpns eval {folder})")
        configs[folder] = RunConfig.from_dict(read_json(folder / "run.json")["config"])
    found = _find_differences(configs) if choices is None else choices
    return [Run(f.name, f, configs[f], found[f], describe_run(f)) for f in configs]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order in which they first come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.arm, []).append(run)
    return [Arm(name, sorted(group, key=lambda run: run.config.seed)) for name, group in groups.items()]


def compare_arms(first: Arm, second: Arm) -> PairedTest | None:
    """A paired test over the seeds that both have; None where those are fewer than two."""
    ours, theirs = ({run.config.seed: run.row["accuracy"] for run in arm.runs} for arm in (first, second))
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) < 2:
        return None
    return compare_paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def describe_choices(choices: Mapping[str, str]) -> str:
    """Words by themselves, numbers with their setting's name."""
    return ", ".join(v if v[:1].isalpha() else f"{k} {v}" for k, v in choices.items())


def _find_differences(configs: Mapping[Path, RunConfig]) -> dict[Path, dict[str, str]]:
    settings = {folder: flatten(config.to_dict()) for folder, config in configs.items()}
    keys = dict.fromkeys(key for flat in settings.values() for key in flat if key not in FREE_KEYS)
    differing = [key for key in keys if len({repr(flat.get(key)) for flat in settings.values()}) > 1]
    return {folder: {key: str(flat.get(key)) for key in differing} for folder, flat in settings.items()}
