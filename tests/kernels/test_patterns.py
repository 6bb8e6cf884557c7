"""Do the patterns agree with themselves: unit shapes, expansion, sums and text forms?"""

from __future__ import annotations

import math
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpns_kernels import Pattern, parse_pattern
from vpns_kernels.patterns import NM, PATTERNS, Block, Channel, Unstructured

SPECS = ["unstructured", "block:4x8", "block:16x16", "block:1x3", "channel", "nm:2:4", "nm:1:3"]
# Multiples of the blocks, ragged in one or both directions, smaller than a block, linear.
SHAPES = [(16, 16, 3, 3), (17, 8, 1, 1), (5, 9, 2, 3), (3, 1, 7, 7), (1, 1, 1, 1), (10, 130), (4, 3)]


def brute_force_units(pattern: Pattern, shape: tuple[int, ...]) -> torch.Tensor:
    """The flat number of each weight's unit, from the definition of the pattern alone."""
    numbers = torch.empty(shape, dtype=torch.int64)
    units = pattern.units_shape(shape)
    for index in product(*map(range, shape)):
        unit = index
        if isinstance(pattern, Block):
            unit = (index[0] // pattern.bk, index[1] // pattern.bc, *index[2:])
        elif isinstance(pattern, Channel):
            unit = index[:1]
        numbers[index] = sum(i * math.prod(units[axis + 1 :]) for axis, i in enumerate(unit))
    return numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_each_weight_belongs_to_the_unit_of_the_definition(spec: str, shape: tuple[int, ...]) -> None:
    pattern = parse_pattern(spec)
    units = pattern.units_shape(shape)
    numbers = torch.arange(torch.Size(units).numel()).view(units)
    expanded = pattern.expand(numbers, shape)
    assert torch.equal(expanded, brute_force_units(pattern, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_sums_over_units_are_the_transpose_of_expansion(spec: str, shape: tuple[int, ...]) -> None:
    pattern, generator = parse_pattern(spec), torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    units = torch.randn(pattern.units_shape(shape), generator=generator, dtype=torch.float64)
    sums = pattern.reduce_sum(dense)
    assert sums.shape == units.shape
    torch.testing.assert_close((sums * units).sum(), (dense * pattern.expand(units, shape)).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_a_ragged_unit_holds_only_weights_that_are_there(spec: str, shape: tuple[int, ...]) -> None:
    pattern = parse_pattern(spec)
    sizes = pattern.reduce_sum(torch.ones(shape))
    assert int(sizes.min()) >= 1
    assert int(sizes.sum()) == torch.Size(shape).numel()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9), st.integers(0, 8))
def test_a_spec_survives_the_round_trip(bk: int, bc: int, n: int, more: int) -> None:
    for pattern in (Unstructured(), Channel(), Block(bk, bc), NM(n, n + more)):
        assert parse_pattern(pattern.spec) == pattern
        assert pattern.spec.split(":")[0] == pattern.name


def test_every_pattern_is_known_by_its_name_and_has_defaults() -> None:
    assert {"unstructured", "block", "channel", "nm"} == set(PATTERNS)
    for name, kind in PATTERNS.items():
        assert type(parse_pattern(name)) is kind


@pytest.mark.parametrize(
    "spec",
    [
        "", "blocks", "Block:4x4", " block", "block:", "block:32", "block:32x", "block:0x4", "block:4x0",
        "block:-4x4", "block:4x4x4", "block:4x4:1", "channel:3", "unstructured:", "nm:2", "nm:2:4:8",
        "nm:0:4", "nm:5:4", "nm:a:b", "nm:-1:4", "nm:2:",
    ],
)  # fmt: skip
def test_a_bad_spec_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse_pattern(spec)
    # What follows a known name is checked by number, or shown with it.
    is_number = re.fullmatch(r"block:\d+x\d+|nm:\d+:\d+", spec)
    assert is_number or f"got {spec!r}" in str(caught.value)


@pytest.mark.parametrize("spec", ["unstructured", "block:2x2", "channel"])
@pytest.mark.parametrize("density", [0.0, 1.5, -0.5, float("nan")])
def test_a_density_outside_zero_to_one_is_refused(spec: str, density: float) -> None:
    with pytest.raises(ValueError, match=r"expected a kept fraction in \(0, 1\]"):
        parse_pattern(spec).check_density(density)


def test_n_of_m_has_one_density() -> None:
    assert NM(2, 4).check_density(0.5) == 0.5
    assert NM(1, 3).check_density(1 / 3) == 1 / 3
    with pytest.raises(ValueError, match=r"expected 0\.5 for pattern nm:2:4, got 0\.4"):
        NM(2, 4).check_density(0.4)


@pytest.mark.parametrize("shape", [(3, 8, 2, 2), (2, 10, 1, 3), (5, 3, 3, 3), (4, 13), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 3)])
def test_n_of_m_keeps_the_largest_of_each_group(shape: tuple[int, ...], n: int, m: int) -> None:
    # Halves make ties, which go to the lower channel.
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2).round() / 2
    mask = NM(n, m).keep_largest(scores)
    rows, masks = scores.abs().movedim(1, -1).flatten(0, -2), mask.movedim(1, -1).flatten(0, -2)
    for row, kept in zip(rows.tolist(), masks.tolist(), strict=True):
        for begin in range(0, len(row), m):
            group = row[begin : begin + m]
            order = sorted(range(len(group)), key=lambda c: (-group[c], c))
            assert [c for c in range(len(group)) if kept[begin + c]] == sorted(order[:n])
