"""How long does it take, against what? Interleaved timing, one measurement at a time on a machine."""

from __future__ import annotations

import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

_Callable = TypeVar("_Callable", bound=Callable[[], object])
LOCK_PATH = Path(tempfile.gettempdir()) / "vpns-measure.lock"
# What a two-sided 95 % interval may leave out.
_OUTSIDE_FRAC = 0.05
# What takes a second and is this many times slower than the fastest is timed once.
_HOPELESS = 5
# Untimed rounds of what marks its phases: steps of training, which take seconds.
_PHASES_WARMUP = 1


@dataclass(frozen=True)
class Sample:
    """The times of one callable, in milliseconds, in the order of the rounds."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median of the times, in milliseconds."""
        return median(self.times_ms)

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the times in milliseconds, interpolated linearly between the nearest ranks."""
        ordered = sorted(self.times_ms)
        place = (len(ordered) - 1) * percent / 100
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    def to_dict(self) -> dict[str, float]:
        """Median and spread, as results files hold them."""
        return {
            "median_ms": self.median_ms,
            "p20_ms": self.percentile_ms(20),
            "p80_ms": self.percentile_ms(80),
            "rounds": len(self.times_ms),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the second is: median over rounds, and a 95 % interval of the median."""

    median: float
    low: float
    high: float


def interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    rest_s: float = 0.0,
) -> dict[str, Sample]:
    """Time callables in turn, A B A B, so that what disturbs the machine disturbs all of them alike.

    Args:
        rounds: how often each is timed.
        warmup: untimed rounds before.
        clock: seconds, monotonic.
        rest_s: seconds of rest before each call, untimed: threads of another engine may wait in a loop for
            a while after their work, and would take the cores.
    """
    if rounds < 1 or not callables:
        raise ValueError(
            f"interleave: expected callables and at least 1 round, got {rounds} of {len(callables)}"
        )
    times: dict[str, list[float]] = {name: [] for name in callables}
    for number in range(warmup + rounds):
        for name, function in callables.items():
            if rest_s:
                time.sleep(rest_s)
            started = clock()
            function()
            if number >= warmup:
                times[name].append(1000 * (clock() - started))
    return {name: Sample(tuple(taken)) for name, taken in times.items()}


def drop_hopeless(callables: Mapping[str, _Callable], timed: Mapping[str, Sample]) -> dict[str, _Callable]:
    """Without what takes a second or more and many times the fastest: bfloat16 on a CPU that lacks it, say.

    Args:
        timed: a first sample of each.
    """
    fastest = min(timed[name].median_ms for name in callables)
    limit_ms = max(_HOPELESS * fastest, 1000)
    return {name: call for name, call in callables.items() if timed[name].median_ms <= limit_ms}


class Laps:
    """A stopwatch inside a callable: what passes between two marks is counted for the phase of the second."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.taken_ms: dict[str, float] = {}
        self.skip()

    def skip(self) -> None:
        """What passed since the last mark belongs to no phase."""
        self._since = self._clock()

    def mark(self, phase: str) -> None:
        """What passed since the last mark is added to a phase."""
        now = self._clock()
        self.taken_ms[phase] = self.taken_ms.get(phase, 0.0) + 1000 * (now - self._since)
        self._since = now


def interleave_phases(
    callables: Mapping[str, Callable[[Laps], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Sample]]:
    """Time callables in turn that mark their own phases, the same in each round: a Sample for each phase."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in callables}

    def run(name: str) -> None:
        laps = Laps(clock)
        callables[name](laps)
        taken[name].append(laps.taken_ms)

    interleave({name: partial(run, name) for name in callables}, rounds, _PHASES_WARMUP, clock)
    return {
        name: {phase: Sample(tuple(one[phase] for one in found[_PHASES_WARMUP:])) for phase in found[-1]}
        for name, found in taken.items()
    }


def add_up(phases: Mapping[str, Sample]) -> Sample:
    """All phases together, round by round."""
    return Sample(tuple(map(sum, zip(*(sample.times_ms for sample in phases.values()), strict=True))))


def compare(slow: Sample, fast: Sample) -> Ratio:
    """slow / fast, round by round, with an interval that assumes nothing of their distribution.

    It lies between order statistics, by the binomial distribution of how many ratios fall below the median.
    With fewer than six rounds it is all that was seen, which is less than 95 %.
    """
    ratios = sorted(a / b for a, b in zip(slow.times_ms, fast.times_ms, strict=True))
    cut = _outer_ranks(len(ratios))
    return Ratio(median(ratios), ratios[cut], ratios[-1 - cut])


def _outer_ranks(count: int) -> int:
    """How many of `count` sorted values lie outside the interval, at either end."""
    cut, below = 0, 1
    # `below` of 2^count outcomes have at most `cut` values below the median.
    while 2 * (below + math.comb(count, cut + 1)) <= _OUTSIDE_FRAC * 2**count:
        cut += 1
        below += math.comb(count, cut)
    return cut


@contextmanager
def measurement_lock(path: Path = LOCK_PATH) -> Iterator[None]:
    """Hold the machine's one measurement lock; waits, and says so, while another holds it.

    Another may be in this process: it is not for nesting.
    """
    descriptor = _open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another measurement to end ({path})", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    # In a shared temp folder a file of another user may be read and locked, but not opened to create.
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
