"""What would a sweep cost? One iteration of each kind of run is measured, and multiplied."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vpns.batches import count_iterations
from vpns.config import DataConfig, RunConfig, StageConfig
from vpns.data import ImageSet, Split, load_data
from vpns.files import make_folder
from vpns.methods import find_method
from vpns.observe import EpochMetrics, Observer, Start, Step
from vpns.stages import STAGES, Context
from vpns.state import StageRecord
from vpns.sweep.grid import Grid, PlannedRun
from vpns.sweep.plan import dense_settings, plan_jobs

# A process that starts, loads its images and its network, and traces it.
_START_SECONDS = 2.0
# The first epoch warms up, the second counts.
_EPOCHS = 2
_VAL_IMAGES = 64
_TRAINED = ("dense", "search", "tune")


@dataclass(frozen=True)
class Estimate:
    """Seconds of every job if it ran alone, in the order they are planned.

    Args:
        measured: ms of one update, of each run that was measured, by stage.
    """

    seconds: dict[str, float]
    measured: dict[str, dict[str, float]]

    def wall_seconds(self, workers: int) -> float:
        """Of all jobs, side by side."""
        return max([sum(self.seconds.values()) / workers, *self.seconds.values()])


def estimate_cost(grid: Grid, folder: Path, threads: int) -> Estimate:
    """Measure runs that differ in more than seed, density and pattern, each at its largest density.

    Timing at the end of a sweep is left out: it takes as long as it takes to be sure.
    """
    seconds, measured, rates = {}, {}, dict[str, tuple[_Rates, ImageSet]]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind, runs in _group(grid.runs).items():
            run = max(runs, key=lambda run: run.config.density)
            rates[kind] = _measure(run.config)
            measured[run.name] = {
                stage: 1000 * value for stage, value in rates[kind][0].update_seconds.items()
            }
    finally:
        torch.set_num_threads(before)
    for job in plan_jobs(grid, folder, threads):
        kinds = [
            rates[_kind(run.config)]
            for run in grid.runs
            if job.name == run.name or (job.needs is None and _lends(job.config, run.config, threads))
        ]
        seconds[job.name] = _job_seconds(job.config, *kinds[0], is_reference=job.needs is None)
    return Estimate(seconds, measured)


@dataclass(frozen=True)
class _Rates:
    """Seconds per update, and updates per iteration, by stage; seconds per image that is only looked at."""

    update_seconds: dict[str, float]
    passes: dict[str, int]
    image_seconds: float


class _Stopwatch(Observer):
    """Times the last epoch's updates, and its validation."""

    def __init__(self) -> None:
        self.rates = _Rates({}, {}, 0.0)
        self._updates = 0
        self._began_at = self._stepped_at = 0.0

    def on_start(self, start: Start) -> None:
        self.rates.passes[start.stage] = start.updates // _EPOCHS
        self._updates = 0

    def on_step(self, step: Step) -> None:
        self._updates += 1
        self._stepped_at = time.monotonic()

    def on_eval(self, metrics: EpochMetrics) -> None:
        now = time.monotonic()
        if metrics.epoch == _EPOCHS:
            took = self._stepped_at - self._began_at
            self.rates.update_seconds[metrics.stage] = took / self._updates
            self.rates = replace(self.rates, image_seconds=(now - self._stepped_at) / _VAL_IMAGES)
        self._began_at, self._updates = now, 0


def _group(runs: Sequence[PlannedRun]) -> dict[str, list[PlannedRun]]:
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(_kind(run.config), []).append(run)
    return groups


def _kind(config: RunConfig) -> str:
    alike = replace(config, seed=0, density=1.0, pattern="unstructured", threads=0)
    return json.dumps(alike.to_dict(), sort_keys=True)


def _lends(reference: RunConfig, config: RunConfig, threads: int) -> bool:
    return reference == dense_settings(replace(config, threads=threads))


def _measure(config: RunConfig) -> tuple[_Rates, ImageSet]:
    """By the stages themselves, on one batch of the run's own images."""
    images = load_data(config.data, config.seed, config.prompt.canvas)
    batch = max(config.search.batch_size, config.tune.batch_size)
    cut = replace(
        config,
        pretrain=replace(config.pretrain, epochs=0),
        search=replace(config.search, epochs=_EPOCHS, batch_size=batch),
        tune=replace(config.tune, epochs=_EPOCHS, batch_size=batch),
    )
    with tempfile.TemporaryDirectory(prefix="vpns-") as folder:
        watch = _Stopwatch()
        context = Context(Path(folder), cut, [watch])
        # In place of what the context would load.
        context.images = ImageSet(
            _take(images.train, batch), _take(images.val, _VAL_IMAGES), images.test, images.class_names
        )
        for stage in STAGES:
            if stage.name in ("pretrain", *_TRAINED):
                make_folder(context.stage_folder(stage.name))
                context.finished[stage.name] = StageRecord(stage.run(context), {}, {})
    return watch.rates, images


def _take(split: Split, count: int) -> Split:
    return split.select(torch.arange(count) % len(split))


def _job_seconds(config: RunConfig, rates: _Rates, images: ImageSet, is_reference: bool) -> float:
    seconds = _START_SECONDS
    if not is_reference:
        if find_method(config.method).learns_scores:
            seconds += _stage_seconds("search", config.search, rates, images)
        # Tested dense, and sparse without and with the prompt.
        return (
            seconds
            + _stage_seconds("tune", config.tune, rates, images)
            + 3 * len(images.test) * (rates.image_seconds)
        )
    seconds += _stage_seconds("dense", config.tune, rates, images)
    if config.model.weights is None and config.pretrain.epochs:
        letters = load_data(DataConfig("letters", val_fraction=0.1), config.seed, config.prompt.canvas)
        share = config.pretrain.batch_size / config.tune.batch_size
        alike = replace(
            rates,
            update_seconds={"dense": rates.update_seconds["dense"] * share},
            passes={"dense": config.pretrain.passes},
        )
        seconds += _stage_seconds("dense", config.pretrain, alike, letters)
    return seconds


def _stage_seconds(stage: str, settings: StageConfig, rates: _Rates, images: ImageSet) -> float:
    updates = count_iterations(images.train, settings.batch_size) * rates.passes[stage]
    each = updates * rates.update_seconds[stage] + len(images.val) * rates.image_seconds
    return settings.epochs * each
