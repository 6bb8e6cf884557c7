"""What would a sweep cost? One iteration of each kind of run is measured, and multiplied."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vpns.config import RunConfig
from vpns.data import load_data
from vpns.estimate import Counts, Rates, measure_rates, stage_seconds
from vpns.sweep.grid import Grid, PlannedRun
from vpns.sweep.plan import dense_settings, plan_jobs

# A process that starts, loads its images and its network, and traces it.
_START_SECONDS = 2.0
# Stages that a reference does for all runs that begin with it.
_SHARED = ("pretrain", "dense")


@dataclass(frozen=True)
class Estimate:
    """Seconds of every job if it ran alone, in the order they are planned.

    Args:
        measured: ms of one update at the stage's batch, of each run that was measured, by stage.
    """

    seconds: dict[str, float]
    measured: dict[str, dict[str, float]]

    def wall_seconds(self, workers: int) -> float:
        """Seconds that all jobs take side by side."""
        return max([sum(self.seconds.values()) / workers, *self.seconds.values()])


def estimate_cost(grid: Grid, folder: Path, threads: int) -> Estimate:
    """Measure runs that differ in more than seed, density and pattern, each at its largest density.

    Timing at the end of a sweep is left out: it takes as long as it takes to be sure.
    """
    rates, measured = dict[str, Rates](), dict[str, dict[str, float]]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for run in sorted(grid.runs, key=lambda run: -run.config.density):
            kind = _kind(run.config)
            if kind not in rates:
                rates[kind] = measure_rates(run.config)
                measured[run.name] = _tell_updates(run.config, rates[kind])
    finally:
        torch.set_num_threads(before)
    by_name = {run.name: run for run in grid.runs}
    lent = {_kind(dense_settings(run.config)): run for run in grid.runs}
    seconds = {}
    for job in plan_jobs(grid, folder, threads):
        run = by_name.get(job.name) or lent[_kind(job.config)]
        seconds[job.name] = _START_SECONDS + _job_seconds(run, rates[_kind(run.config)], job.needs is None)
    return Estimate(seconds, measured)


def _kind(config: RunConfig) -> str:
    """Equal for runs whose updates cost much the same."""
    alike = replace(config, seed=0, density=1.0, pattern="unstructured", threads=0)
    return json.dumps(alike.to_dict(), sort_keys=True)


def _tell_updates(config: RunConfig, rates: Rates) -> dict[str, float]:
    sizes = {"search": config.search.batch_size}
    return {
        stage: 1000 * line.at(sizes.get(stage, config.tune.batch_size))
        for stage, line in rates.update_s.items()
    }


def _job_seconds(run: PlannedRun, rates: Rates, is_reference: bool) -> float:
    config = run.config
    images = load_data(config.data, config.seed, config.prompt.canvas)
    counts = Counts(len(images.train), len(images.val), len(images.test))
    stages = stage_seconds(config, rates, counts)
    return sum(seconds for stage, seconds in stages.items() if (stage in _SHARED) == is_reference)
