"""Is one arm better than another? Paired by seed; with an interval, a test, and what it could have seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class PairedTest:
    """The second arm against the first, run by run.

    Args:
        difference: mean of second minus first.
        low, high: of its 95 % interval (Student's t).
        p_value: of the two-sided paired t-test.
        deviation: of a pair's difference.
        detectable: the smallest true difference that this many pairs find four times out of five.
    """

    pairs: int
    difference: float
    low: float
    high: float
    p_value: float
    deviation: float
    detectable: float


def compare_paired(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Student's paired t-test of two arms whose values stand in the same order of seeds."""
    from scipy import stats

    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"compare_paired: expected two or more pairs, got {len(first)} and {len(second)} values"
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    deviation, mean = statistics.stdev(differences), statistics.fmean(differences)
    pairs = len(differences)
    if deviation == 0:
        # Nothing varies: the test would divide by it.
        return PairedTest(pairs, mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, 0.0)
    tested = stats.ttest_1samp(differences, 0.0)
    interval = tested.confidence_interval(CONFIDENCE)
    detectable = detectable_effect(deviation, pairs)
    low, high = float(interval.low), float(interval.high)
    return PairedTest(pairs, mean, low, high, float(tested.pvalue), deviation, detectable)


def find_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean (Student's t), as (low, high); None of a single value."""
    from scipy import stats

    if len(values) < 2:
        return None
    half = statistics.stdev(values) / math.sqrt(len(values))
    half *= float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def detectable_effect(deviation: float, pairs: int) -> float:
    """The true difference that a paired t-test finds with probability 0.8 at level 0.05."""
    from scipy import optimize, stats

    degrees = pairs - 1
    limit = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))

    def lacks(shift: float) -> float:
        # The square of the noncentral t; scipy's own t has holes where this has none.
        return float(stats.ncf.sf(limit**2, 1, degrees, shift**2)) - POWER

    shift = optimize.brentq(lacks, 0.0, 10 * limit)
    return float(shift) * deviation / math.sqrt(pairs)
