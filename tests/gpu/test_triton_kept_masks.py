"""Does a refresh by Triton's kernels keep the units that the CPU's keeps, under both rules?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpns_kernels import native, parse_pattern, refresh_mask
from vpns_kernels.ops._triton import kept_masks
from vpns_kernels.ops._triton.chunks import chunk_table, pick_tiles

CHUNK, TILE = pick_tiles().chunk, pick_tiles().tile
PATTERN = parse_pattern("unstructured")


def make_scores(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    scores = [
        torch.randn(size, generator=generator) for size in ((7,), (40, 25), (0, 3), (CHUNK + TILE + 3,))
    ]
    if kind == "ties":
        # About one score in sixteen has the same magnitude, in every tensor and on both sides of a chunk.
        return [(tensor * 8).round() / 8 for tensor in scores]
    if kind == "equal":
        return [torch.full_like(tensor, -0.5) for tensor in scores]
    if kind == "strided":
        return [torch.full((5, 3, 4, 4), 2.0).contiguous(memory_format=torch.channels_last)]
    return scores


@pytest.mark.parametrize("rule", ["exact", "published"])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "strided"])
def test_masks_and_numbers_are_those_of_the_cpu(
    kind: str, density: float, rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = make_scores(kind)
    expected = refresh_mask(scores, PATTERN, density, rule, backend="reference")
    with monkeypatch.context() as patch:
        patch.setattr(native, "why_not", lambda: "not in this test")
        patch.setattr(native, "why_no_cuda", lambda: "not in this test")
        moved = [tensor.to(device) for tensor in scores]
        found = refresh_mask(moved, PATTERN, density, rule, backend="triton")
    for mask, other, tensor in zip(found.masks, expected.masks, moved, strict=True):
        assert mask.dtype == torch.bool
        assert mask.device == tensor.device
        assert torch.equal(mask.cpu(), other)
    numbers = [(one.threshold, one.ties_kept, one.kept) for one in (found, expected)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("ties_kept", [0, 1, TILE, TILE + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4])
def test_the_first_ties_stay_wherever_the_last_of_them_lies(ties_kept: int, device: torch.device) -> None:
    scores = [torch.full((CHUNK,), 1.0, device=device), torch.full((CHUNK + 5,), -1.0, device=device)]
    one, count = torch.ones((), device=device), torch.tensor(ties_kept, device=device)
    masks, stay = kept_masks.take_kept(scores, one, count)
    assert torch.cat(masks).tolist() == [place < ties_kept for place in range(2 * CHUNK + 5)]
    assert int(stay) == ties_kept


def test_nan_is_refused_when_a_number_is_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "not in this test")
    scores = [torch.tensor([1.0, float("nan"), 3.0], device=device)]
    with pytest.raises(ValueError, match="expected scores without NaN"):
        _ = refresh_mask(scores, PATTERN, 0.5, backend="triton").threshold


def test_the_table_holds_every_score_once() -> None:
    first, second, empty = torch.zeros(10), torch.zeros(4), torch.zeros(0)
    rows = chunk_table([first, empty, second], 4).tolist()
    starts = [first.data_ptr() + 4 * place for place in (0, 4, 8)]
    assert rows == [[starts[0], 4, 0], [starts[1], 4, 4], [starts[2], 2, 8], [second.data_ptr(), 4, 10]]
