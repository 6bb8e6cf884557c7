"""Who watches a run? Observers, which see plain numbers and so cannot change what is trained."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm


@dataclass(frozen=True)
class StageStart:
    """A stage that trains begins, or goes on; other stages tell their end alone.

    Args:
        updates: how many it will make.
        updates_done: how many it has made, more than 0 when it is resumed.
    """

    stage: str
    updates: int = 0
    updates_done: int = 0


@dataclass(frozen=True)
class Step:
    """One update."""

    stage: str
    epoch: int
    iteration: int
    loss: float


@dataclass(frozen=True)
class EpochMetrics:
    """One row of the metrics: an epoch's training, and the validation after it.

    Args:
        epoch, iteration: how many were done in this stage.
        loss: mean over the epoch's training images.
        train_accuracy: of the epoch's training batches as they came, 0-100.
        accuracy: on the validation split, at the run's own inference setting, 0-100.
        updates, images_seen, seconds: since this stage began.
    """

    stage: str
    epoch: int
    iteration: int
    loss: float
    train_accuracy: float
    accuracy: float
    lr: float
    updates: int
    images_seen: int
    seconds: float


@dataclass(frozen=True)
class Checked:
    """A stage's kernels were compared with the dense reference, and agree.

    Args:
        share: of its bound that the worst gradient was off.
    """

    stage: str
    iterations: int
    share: float


@dataclass(frozen=True)
class End:
    """A stage has finished."""

    stage: str
    result: dict[str, Any]
    seconds: float


class Observer:
    """Base of observers: each method is called at its moment and may do nothing."""

    def on_start(self, start: StageStart) -> None:
        """Training of a stage begins or resumes."""

    def on_step(self, step: Step) -> None:
        """An update was made."""

    def on_eval(self, metrics: EpochMetrics) -> None:
        """An epoch was validated."""

    def on_check(self, checked: Checked) -> None:
        """Kernels and reference were compared."""

    def on_end(self, end: End) -> None:
        """A stage has finished."""


class Progress(Observer):
    """A bar per training stage on a terminal, and one line per finished stage anywhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None

    def on_start(self, start: StageStart) -> None:
        self._close()
        if start.updates and self._stream.isatty():
            self._bar = tqdm(
                total=start.updates,
                initial=start.updates_done,
                desc=f"{start.stage:9}",
                file=self._stream,
                unit="update",
                leave=False,
            )

    def on_step(self, step: Step) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_eval(self, metrics: EpochMetrics) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics.loss:.3f}, validation {metrics.accuracy:.1f}")

    def on_check(self, checked: Checked) -> None:
        print(
            f"{checked.stage:9} kernels agree with the reference for {checked.iterations} iterations "
            f"(worst gradient at {checked.share:.0%} of its bound)",
            file=self._stream,
            flush=True,
        )

    def on_end(self, end: End) -> None:
        self._close()
        shown = [f"{key} {value:.4g}" for key, value in end.result.items() if isinstance(value, float)]
        print(f"{end.stage:9} {end.seconds:7.1f} s  {', '.join(shown)}", file=self._stream, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
