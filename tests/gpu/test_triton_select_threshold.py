"""Is the k-th largest magnitude of the Triton backend the reference's, to the last tie?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vpns_kernels import select_threshold
from vpns_kernels.ops._triton import bracket
from vpns_kernels.ops._triton.bracket import (
    ABOVE,
    HIGH,
    LOW,
    SAMPLES,
    WITHIN,
    gather_bracket,
    sample_ranks,
)
from vpns_kernels.ops._triton.chunks import chunk_table, pick_tiles, sample_table
from vpns_kernels.ops.registry import OPS
from vpns_kernels.ops.select_threshold import reference

TRITON = OPS["select_threshold"].module("triton")
CHUNK, TILE = pick_tiles().chunk, pick_tiles().tile


def found(scores: Sequence[Tensor], kept: int) -> tuple[float, int]:
    threshold, ties_kept = TRITON.run(scores, kept)
    return float(threshold), int(ties_kept)


def expected(scores: Sequence[Tensor], kept: int) -> tuple[float, int]:
    threshold, ties_kept = reference.run([tensor.cpu() for tensor in scores], kept)
    return float(threshold), int(ties_kept)


def random_scores(device: torch.device, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


@pytest.mark.parametrize("kept", [1, 2, 7, 500, 1000, 1002, 1003])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "zeros", "infinite", "tiny"])
def test_every_count_of_every_kind_of_scores(kind: str, kept: int, device: torch.device) -> None:
    scores = random_scores(device, 3, 1000)
    if kind == "ties":
        scores = [tensor.round() for tensor in scores]
    elif kind == "equal":
        scores = [torch.full_like(tensor, -1.5) for tensor in scores]
    elif kind == "zeros":
        # Both zeros are one magnitude.
        scores = [torch.where(tensor > 2, tensor, tensor.sign() * 0.0) for tensor in scores]
    elif kind == "infinite":
        scores[1][::3] = torch.tensor([float("inf"), float("-inf")], device=device).repeat(167)
    elif kind == "tiny":
        # Subnormal numbers, a few steps of the last bit apart.
        scores = [(tensor * 4).round() * 1.4e-45 for tensor in scores]
    assert found(scores, kept) == expected(scores, kept)


@pytest.mark.parametrize("size", [1, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_lengths_about_a_tile_and_a_chunk(size: int, device: torch.device) -> None:
    scores = random_scores(device, size)
    kept = max(1, size // 10)
    assert found(scores, kept) == expected(scores, kept)


def test_many_tensors_empty_ones_and_such_as_begin_anywhere(device: torch.device) -> None:
    (large,) = random_scores(device, 400)
    scores = [large[start : start + start % 23] for start in range(1, 60)]
    scores.append(large.view(20, 20)[:, 3:9])
    kept = sum(tensor.numel() for tensor in scores) // 3
    assert found(scores, kept) == expected(scores, kept)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF])
@pytest.mark.parametrize("place", [(0, 0), (1, 17)])
def test_any_nan_anywhere_is_refused(bits: int, place: tuple[int, int], device: torch.device) -> None:
    scores = random_scores(device, 5, 18)
    scores[place[0]].view(torch.int32)[place[1]] = bits
    for kept in (1, 3, 23):
        assert found(scores, kept)[0] != found(scores, kept)[0]
    with pytest.raises(ValueError, match="expected scores without NaN"):
        select_threshold(scores, 0.5, backend="triton")


def test_other_types_and_too_many_scores_are_refused(device: torch.device) -> None:
    with pytest.raises(NotImplementedError, match=r"it takes float32 scores, got torch\.float64"):
        select_threshold([torch.zeros(3, dtype=torch.float64, device=device)], 0.5, backend="triton")
    many = [torch.empty(2**30, device="meta")] * 2
    assert "it counts in 32 bits, got 2147483648 scores" in TRITON._module.why_not(many, 1)
    assert TRITON._module.why_not(many[:1], 1) is None


def bracket_of(scores: Sequence[Tensor], kept: int) -> tuple[int, int]:
    """How many scores are above the bracket, and within."""
    chunks = chunk_table(scores, CHUNK)
    counts = torch.empty(1024, dtype=torch.int32, device=chunks.device)
    state, candidates = gather_bracket(scores, chunks, kept, counts, capacity=scores[0].numel())
    above, within = (int(state[place.value]) for place in (ABOVE, WITHIN))
    assert not counts.any()
    low, high = (int(state[place.value]) for place in (LOW, HIGH))
    magnitude = torch.cat(list(scores)).abs()
    bits = magnitude.view(torch.int32)
    assert above == int((bits > high).sum())
    expected_values = magnitude[(bits >= low) & (bits <= high)].sort().values
    assert torch.equal(candidates[:within].abs().sort().values, expected_values)
    return above, within


@pytest.mark.parametrize("kept", [1, 1000, 60_000, 150_000])
def test_a_sample_leaves_few_scores_in_question(kept: int, device: torch.device) -> None:
    scores = random_scores(device, 100_000, 50_000)
    above, within = bracket_of(scores, kept)
    assert above < kept <= above + within
    # Ten deviations of the sample's rank, at most a half of a share of 1 / √8192, and what the cut adds.
    assert within < 0.07 * 150_000


@pytest.mark.parametrize("ranks", [(0, 1), (100, 101), (8000, SAMPLES + 1), (4000, 4001), (0, SAMPLES + 1)])
@pytest.mark.parametrize("kind", ["plain", "equal"])
def test_a_bracket_that_misses_or_overflows_changes_nothing(
    ranks: tuple[int, int], kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = random_scores(device, 40_000, 7)
    if kind == "equal":
        scores = [torch.full_like(tensor, 0.75) for tensor in scores]
    monkeypatch.setattr(bracket, "sample_ranks", lambda kept, total: ranks)
    assert found(scores, 20_000) == expected(scores, 20_000)


def test_nan_beyond_the_bracket_and_above_it_is_seen(device: torch.device) -> None:
    scores = random_scores(device, 40_000)
    scores[0][39_999] = float("nan")
    for kept in (1, 2, 20_000, 40_000):
        assert found(scores, kept)[0] != found(scores, kept)[0]


@pytest.mark.parametrize("total", [1, 5, SAMPLES, 3 * SAMPLES + 1, 10**8])
def test_the_ranks_of_a_sample_hold_those_of_all(total: int) -> None:
    for kept in (1, total // 3 + 1, total):
        upper, lower = sample_ranks(kept, total)
        assert 0 <= upper < SAMPLES * kept / total <= lower <= SAMPLES + 1
        # Five deviations on either side.
        spread = (kept / total * (1 - kept / total) * SAMPLES) ** 0.5
        assert lower - upper <= 10 * spread + 6


def test_a_sample_takes_one_entry_of_each_share(device: torch.device) -> None:
    sizes = (SAMPLES, 0, 2 * SAMPLES, 5)
    scores = [torch.zeros(size, device=device) for size in sizes]
    total, starts = sum(sizes), [0, sizes[0], sizes[0], 3 * SAMPLES]
    places = []
    for address in sample_table(scores, SAMPLES).tolist():
        for tensor, start in zip(scores, starts, strict=True):
            offset = address - tensor.data_ptr()
            if 0 <= offset < 4 * tensor.numel():
                assert offset % 4 == 0
                places.append(start + offset // 4)
    assert len(places) == SAMPLES
    # The entry in which a point of the share lies, and not always in its middle.
    share = total / SAMPLES
    offsets = [(place - number * share) / share for number, place in enumerate(places)]
    assert -1 / share < min(offsets) < 0.1
    assert 0.5 < max(offsets) < 1
