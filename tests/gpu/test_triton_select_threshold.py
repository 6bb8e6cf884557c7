"""Is the k-th largest magnitude of the Triton backend the reference's, to the last tie?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vpns_kernels import select_threshold
from vpns_kernels.ops._triton.chunks import pick_tiles
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
