"""Does a refresh keep exactly the units it should, under both rules, however many scores are equal?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vpns_kernels import Refresh, parse_pattern, refresh_mask

PATTERN = parse_pattern("unstructured")
# Quarters tie often; two tensors of any length, one of two dimensions.
QUARTERS = st.integers(-6, 6).map(lambda value: value / 4)
SCORES = st.tuples(st.lists(QUARTERS, min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda drawn: st.lists(QUARTERS, min_size=drawn[1] * drawn[2], max_size=drawn[1] * drawn[2]).map(
        lambda more: [torch.tensor(drawn[0]), torch.tensor(more).view(drawn[1], drawn[2])]
    )
)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def keep_by_sorting(scores: list[Tensor], kept: int) -> Tensor:
    """The truth: a stable sort by magnitude keeps the lowest flat index among ties."""
    order = flat(scores).abs().argsort(descending=True, stable=True)
    mask = torch.zeros(order.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def published_masks(scores: list[Tensor], density: float) -> list[Tensor]:
    """The published code, line by line: the k-th smallest magnitude and all that tie with it go."""
    everything = torch.cat([score.abs().view(-1) for score in scores])
    k = int((1 - density) * everything.numel())
    if k < 1:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold = torch.kthvalue(everything, k).values
    return [torch.where(score.abs() <= threshold, 0.0, 1.0) == 1.0 for score in scores]


def check_record(scores: list[Tensor], found: Refresh) -> None:
    """What is saved beside the masks describes them."""
    magnitude, mask = flat(scores).abs(), flat(found.masks)
    assert [m.shape for m in found.masks] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in found.masks)
    assert found.kept == int(mask.sum())
    assert int((magnitude > found.threshold).sum()) + found.ties_kept == found.kept
    assert int((mask & (magnitude == found.threshold)).sum()) == found.ties_kept


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SCORES, st.floats(0.01, 1.0))
def test_pruned_fraction_is_exact_with_tied_scores(scores: list[Tensor], density: float) -> None:
    found = refresh_mask(scores, PATTERN, density)
    total = flat(scores).numel()
    assert found.kept == max(1, math.floor(density * total + 0.5))
    assert torch.equal(flat(found.masks), keep_by_sorting(scores, found.kept))
    check_record(scores, found)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SCORES, st.floats(0.01, 1.0))
def test_the_published_rule_equals_the_published_lines(scores: list[Tensor], density: float) -> None:
    found = refresh_mask(scores, PATTERN, density, rule="published")
    assert torch.equal(flat(found.masks), flat(published_masks(scores, density)))
    check_record(scores, found)


@pytest.mark.parametrize("density", [0.1, 0.37, 0.05, 0.9, 1.0])
def test_the_published_rule_equals_the_published_lines_on_distinct_scores(density: float) -> None:
    scores = [torch.randn(64, 3, 7, 7), torch.randn(128, 64, 3, 3), torch.randn(10, 128)]
    found = refresh_mask(scores, PATTERN, density, rule="published")
    assert torch.equal(flat(found.masks), flat(published_masks(scores, density)))
    check_record(scores, found)


def many_scores(kind: str) -> list[Tensor]:
    """More than a sample, in several pieces, a part of one and a few scores by themselves."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(300_037, generator=generator)
    if kind == "coarse":
        scores = (scores * 2).round()
    elif kind == "mostly zero":
        scores[torch.rand(scores.shape, generator=generator) < 0.7] = -0.0
    elif kind == "equal":
        scores = torch.full_like(scores, 0.25)
    elif kind == "infinite and tiny":
        scores[::5], scores[1::7] = float("-inf"), 1e-41
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "hidden from the sample":
        # The places that csrc/cpu/select_threshold.cpp looks at hold nothing of what is large.
        i = torch.arange(1 << 15)
        stride = scores.numel() // (1 << 15)
        scores[i * stride + ((i * 2654435761 & 0xFFFFFFFF) >> 8) % stride] *= 1e-6
    else:
        assert kind == "plain"
    return [scores[:300_000].view(100, 60, 50), scores[300_000:]]


@pytest.mark.parametrize("density", [1e-5, 0.02, 0.1, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize(
    "kind",
    ["plain", "coarse", "mostly zero", "equal", "infinite and tiny", "sorted", "hidden from the sample"],
)
def test_many_scores_are_taken_as_by_sorting_whatever_a_sample_shows(kind: str, density: float) -> None:
    scores = many_scores(kind)
    found = refresh_mask(scores, PATTERN, density)
    assert found.kept == max(1, math.floor(density * flat(scores).numel() + 0.5))
    assert torch.equal(flat(found.masks), keep_by_sorting(scores, found.kept))
    check_record(scores, found)
    published = refresh_mask(scores, PATTERN, density, rule="published")
    assert torch.equal(flat(published.masks), flat(published_masks(scores, density)))
    check_record(scores, published)


def test_the_two_rules_differ_by_ties_and_rounding_alone() -> None:
    tied = [torch.tensor([3.0, 1.0, -1.0, 1.0, 0.5])]
    assert refresh_mask(tied, PATTERN, 0.4).masks[0].tolist() == [True, True, False, False, False]
    assert refresh_mask(tied, PATTERN, 0.4, rule="published").masks[0].tolist() == [True] + [False] * 4
    distinct = [torch.arange(1.0, 11.0)]
    exact, published = (refresh_mask(distinct, PATTERN, 0.5, rule=rule) for rule in ("exact", "published"))
    assert torch.equal(exact.masks[0], published.masks[0])


@pytest.mark.parametrize("spec", ["unstructured", "block:4x4", "channel"])
@pytest.mark.parametrize(("density", "expected"), [(0.25, 3), (0.35, 4), (0.05, 1), (0.44, 4), (1.0, 10)])
def test_density_counts_units_rounded_half_up(spec: str, density: float, expected: int) -> None:
    found = refresh_mask([torch.randn(4), torch.randn(2, 3)], parse_pattern(spec), density)
    assert found.kept == expected


@pytest.mark.parametrize("rule", ["exact", "published"])
def test_density_one_keeps_everything(rule: str) -> None:
    scores = [torch.randn(7, 3), torch.zeros(5)]
    found = refresh_mask(scores, PATTERN, 1.0, rule=rule)
    assert bool(flat(found.masks).all())
    check_record(scores, found)


def test_equal_scores_keep_the_lowest_flat_indices() -> None:
    scores = [torch.full((3, 2), -0.5), torch.full((4,), 0.5)]
    found = refresh_mask(scores, PATTERN, 0.7)
    assert flat(found.masks).tolist() == [True] * 7 + [False] * 3
    assert (found.threshold, found.ties_kept, found.kept) == (0.5, 7, 7)


def test_equal_scores_all_go_under_the_published_rule() -> None:
    found = refresh_mask([torch.full((10,), 0.5)], PATTERN, 0.7, rule="published")
    assert (found.kept, found.ties_kept, found.threshold) == (0, 0, 0.5)


def test_ties_are_counted_in_logical_order_whatever_the_memory_order() -> None:
    scores = torch.full((2, 3, 2, 2), 1.0)
    strided = scores.contiguous(memory_format=torch.channels_last)
    dense, other = (refresh_mask([tensor], PATTERN, 0.4).masks[0] for tensor in (scores, strided))
    assert torch.equal(dense, other)
    assert dense.flatten().tolist() == [True] * 10 + [False] * 14


@pytest.mark.parametrize("spec", ["nm:2:4", "nm:1:4", "nm:1:2"])
def test_n_of_m_keeps_its_share_of_every_group(spec: str) -> None:
    pattern = parse_pattern(spec)
    scores = [torch.randn(8, 16, 3, 3), torch.randn(10, 32), torch.full((4, 8, 1, 1), 0.5)]
    found = refresh_mask(scores, pattern, pattern.n / pattern.m)
    for mask in found.masks:
        counts = mask.movedim(1, -1).unflatten(-1, (-1, pattern.m)).sum(-1)
        assert bool((counts == pattern.n).all())
    assert found.kept == sum(mask.sum() for mask in found.masks)
    assert found.threshold == min(
        float(score.abs()[mask].min()) for score, mask in zip(scores, found.masks, strict=True)
    )


@pytest.mark.parametrize("spec", ["unstructured", "block:2x2", "channel", "nm:2:4"])
def test_nan_scores_and_no_scores_are_refused(spec: str) -> None:
    pattern = parse_pattern(spec)
    with pytest.raises(ValueError, match="expected scores without NaN"):
        refresh_mask([torch.randn(4, 4), torch.tensor([[0.0, float("nan")]])], pattern, 0.5)
    for nothing in ([], [torch.empty(0, 4)]):
        with pytest.raises(ValueError, match="expected at least one score, got none"):
            refresh_mask(nothing, pattern, 0.5)


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_bad_density_or_rule_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"expected a kept fraction in \(0, 1\]"):
        refresh_mask([torch.randn(4)], PATTERN, density)
    with pytest.raises(ValueError, match=r"expected 0\.5 for pattern nm:2:4"):
        refresh_mask([torch.randn(4, 4)], parse_pattern("nm:2:4"), 0.4)
    with pytest.raises(ValueError, match="expected rule 'exact' or 'published', got 'exakt'"):
        refresh_mask([torch.randn(4)], PATTERN, 0.5, rule="exakt")


def test_a_refresh_takes_parameters_and_leaves_no_graph() -> None:
    scores = [torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.randn(2, 2))]
    found = refresh_mask(scores, PATTERN, 0.5)
    assert not any(mask.requires_grad for mask in found.masks)
    assert all(score.grad is None for score in scores)
