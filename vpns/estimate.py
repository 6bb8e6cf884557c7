"""What will a run cost? One iteration of each stage is measured at two small batches, and multiplied.

Time and memory are taken to be straight lines in the number of images of a batch: what every update costs,
and what each image adds to it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vpns.batches import LOOKED_AT_ONCE, count_iterations
from vpns.config import DataConfig, PretrainConfig, RunConfig, StageConfig
from vpns.data import ImageSet, Split, load_data
from vpns.files import make_folder
from vpns.methods import find_method
from vpns.observe import EpochMetrics, Observer, StageStart, Step
from vpns.stages import STAGES, Context
from vpns.stages.networks import stage_passes
from vpns.stages.pretrain import learns_letters
from vpns.state import StageRecord
from vpns_kernels.memory import peak_resident_bytes

_BATCHES = (2, 8)
# The first epoch warms up, the second counts.
_EPOCHS = 2
_TRAINED = ("dense", "search", "tune")


@dataclass(frozen=True)
class Line:
    """What `images` images cost: base + images * each."""

    base: float
    each: float

    def at(self, images: int) -> float:
        """The value for this many images; never less than 0."""
        return max(0.0, self.base + images * self.each)


@dataclass(frozen=True)
class Rates:
    """Measured costs.

    Args:
        update_s: seconds of one update by the size of its batch, by stage.
        looked_at_s: seconds per image that is only looked at.
        memory_bytes: peak of training by the size of the batch; None where this system does not tell.
    """

    update_s: Mapping[str, Line]
    looked_at_s: float
    memory_bytes: Line | None


@dataclass(frozen=True)
class Counts:
    """Images by split."""

    train: int
    val: int
    test: int


def measure_rates(config: RunConfig) -> Rates:
    """Train by the run's own stages on images of noise, from a random start; nothing is downloaded."""
    times: dict[str, dict[int, float]] = {name: {} for name in _TRAINED}
    peaks: dict[int, int] = {}
    looked_at, can_tell = dict[int, float](), True
    for batch in _BATCHES:
        can_tell = _forget_peak() and can_tell
        watch = _measure(config, batch)
        peaks[batch] = peak_resident_bytes()
        looked_at[batch] = watch.looked_at_s
        for name, seconds in watch.update_s.items():
            times[name][batch] = seconds
    lines = {name: _line(found) for name, found in times.items() if found}
    # Images are looked at in large batches, over which what a call costs by itself is spread.
    each = _line(looked_at).at(LOOKED_AT_ONCE) / LOOKED_AT_ONCE
    return Rates(lines, each, _line(peaks) if can_tell and all(peaks.values()) else None)


def stage_seconds(config: RunConfig, rates: Rates, counts: Counts) -> dict[str, float]:
    """Seconds of each stage that trains or tests, in order; timing at the end takes minutes on top."""
    seconds = {"pretrain": _pretrain_seconds(config, rates)} if learns_letters(config) else {}
    seconds["dense"] = _trained("dense", config.tune, len(stage_passes(config, "tune")), rates, counts)
    if find_method(config.method).learns_scores:
        passes = len(stage_passes(config, "search"))
        seconds["search"] = _trained("search", config.search, passes, rates, counts)
    passes = len(stage_passes(config, "tune"))
    seconds["tune"] = _trained("tune", config.tune, passes, rates, counts)
    # Dense, and sparse without and with the prompt.
    seconds["eval"] = 3 * counts.test * rates.looked_at_s
    return seconds


def peak_bytes(config: RunConfig, rates: Rates, counts: Counts) -> float | None:
    """Peak memory of training's largest batch, in bytes; None where this system does not tell."""
    if rates.memory_bytes is None:
        return None
    stages = (config.search, config.tune)
    largest = max(min(stage.batch_size, counts.train) // stage.accumulate for stage in stages)
    return rates.memory_bytes.at(largest)


def _pretrain_seconds(config: RunConfig, rates: Rates) -> float:
    """Letters are learned as the task is learned dense."""
    letters = load_data(DataConfig("letters", val_fraction=0.1), config.seed, config.prompt.canvas)
    size = config.pretrain.batch_size
    updates = count_iterations(letters.train, size) * config.pretrain.passes
    each = updates * rates.update_s["dense"].at(size) + len(letters.val) * rates.looked_at_s
    return config.pretrain.epochs * each


class _Stopwatch(Observer):
    """Times the last epoch's updates, and its validation."""

    def __init__(self) -> None:
        self.update_s: dict[str, float] = {}
        self.looked_at_s = 0.0
        self._updates = 0
        self._began_at = self._stepped_at = 0.0

    def on_start(self, start: StageStart) -> None:
        self._updates = 0

    def on_step(self, step: Step) -> None:
        self._updates += 1
        self._stepped_at = time.monotonic()

    def on_eval(self, metrics: EpochMetrics) -> None:
        now = time.monotonic()
        if metrics.epoch == _EPOCHS:
            self.update_s[metrics.stage] = (self._stepped_at - self._began_at) / self._updates
            self.looked_at_s = now - self._stepped_at
        self._began_at, self._updates = now, 0


def _measure(config: RunConfig, batch: int) -> _Stopwatch:
    cut = replace(
        config,
        model=replace(config.model, weights=None),
        # As many classes as noise needs, whatever the task has.
        label_map=replace(config.label_map, kind="identity"),
        pretrain=PretrainConfig(epochs=0),
        search=replace(config.search, epochs=_EPOCHS, batch_size=batch, accumulate=1),
        tune=replace(config.tune, epochs=_EPOCHS, batch_size=batch, accumulate=1),
        schedule="joint",
        save_every_s=1e9,
    )
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory(prefix="vpns-") as folder:
        context = Context(Path(folder), cut, [watch])
        # In place of what the context would load.
        context.images = _noise(batch, config.prompt.canvas, config.seed)
        for stage in STAGES:
            if stage.name in ("pretrain", *_TRAINED):
                make_folder(context.stage_folder(stage.name))
                context.finished[stage.name] = StageRecord(stage.run(context), {}, {})
    return watch


def _noise(count: int, side: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.zeros(count, dtype=torch.int64))
    return ImageSet(split, split, split, ("noise",))


def _trained(stage: str, settings: StageConfig, passes: int, rates: Rates, counts: Counts) -> float:
    if counts.train == 0:
        return 0.0
    iterations = -(-counts.train // settings.batch_size)
    batch = round(counts.train / iterations)
    update = rates.update_s[stage].at(batch)
    return settings.epochs * (iterations * passes * update + counts.val * rates.looked_at_s)


def _line(found: Mapping[int, float]) -> Line:
    (few, low), (many, high) = sorted(found.items())
    each = max(0.0, (high - low) / (many - few))
    return Line(low - few * each, each)


def _forget_peak() -> bool:
    """Linux keeps a process's peak of memory until it is told to forget it; whether it could be told."""
    path = Path("/proc/self/clear_refs")
    if not os.access(path, os.W_OK):
        return False
    path.write_text("5")
    return True
