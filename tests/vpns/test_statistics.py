"""Do the statistics agree with a plain transcription, find a planted effect, and find none in nothing?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vpns.statistics import compare_paired, detectable_effect, find_interval

FIRST = [92.2, 93.3, 94.7, 91.8, 93.0, 92.6]
SECOND = [93.1, 96.4, 95.6, 92.0, 93.9, 92.1]


def test_a_paired_test_agrees_with_a_plain_transcription() -> None:
    found = compare_paired(FIRST, SECOND)
    difference = np.subtract(SECOND, FIRST)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    reach = stats.t.ppf(0.975, len(difference) - 1) * error
    assert found.pairs == 6
    assert found.difference == pytest.approx(difference.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((difference.mean() - reach, difference.mean() + reach))
    assert found.p_value == pytest.approx(stats.ttest_rel(SECOND, FIRST).pvalue, rel=1e-9)
    assert found.deviation == pytest.approx(difference.std(ddof=1))


def test_an_interval_agrees_with_scipy_and_a_single_value_has_none() -> None:
    error = stats.sem(FIRST)
    assert find_interval(FIRST) == pytest.approx(stats.t.interval(0.95, 5, np.mean(FIRST), error))
    assert find_interval([1.0]) is None


@pytest.mark.parametrize("pairs", [3, 6, 20, 60])
def test_what_is_detectable_is_found_four_times_out_of_five(pairs: int) -> None:
    effect = detectable_effect(1.5, pairs)
    drawn = np.random.default_rng(pairs).normal(effect, 1.5, (20_000, pairs))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_a_planted_point_is_found_and_a_planted_zero_is_not() -> None:
    draw = np.random.default_rng(7)
    seeds = draw.normal(93.0, 1.0, 40)
    first = list(seeds + draw.normal(0, 0.7, 40))
    planted = compare_paired(first, list(seeds + 1.0 + draw.normal(0, 0.7, 40)))
    assert planted.p_value < 0.001
    assert planted.low < 1.0 < planted.high
    assert planted.low > 0
    nothing = compare_paired(first, list(seeds + draw.normal(0, 0.7, 40)))
    assert nothing.p_value > 0.05
    assert nothing.low < 0 < nothing.high


def test_arms_that_never_differ_and_arms_that_always_differ_alike_need_no_division() -> None:
    same = compare_paired(FIRST, FIRST)
    assert (same.difference, same.p_value, same.detectable) == (0.0, 1.0, 0.0)
    shifted = compare_paired([1.0, 2.0], [3.0, 4.0])
    assert (shifted.low, shifted.high, shifted.p_value) == (2.0, 2.0, 0.0)


def test_arms_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more pairs"):
        compare_paired([1.0], [2.0])
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        compare_paired([1.0, 2.0], [2.0])
