"""What is special about select_threshold: exactness on any scores, any thread count, NaN, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpns_kernels import select_threshold

# Few values make ties, the widest floats reach every range of the radix.
TIED = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 1.0, -1.0, 1e-40, float("inf")])
WIDE = st.floats(width=32, allow_nan=False, allow_infinity=True)
LISTS = st.lists(st.lists(TIED, max_size=30), min_size=1, max_size=4) | st.lists(
    st.lists(WIDE, max_size=30), min_size=1, max_size=4
)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def found(scores: list[torch.Tensor], density: float, backend: str) -> tuple[float, int, int]:
    threshold, ties_kept, kept = select_threshold(scores, density, backend=backend)
    return float(threshold), int(ties_kept), kept


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    scores = [torch.randn(13, 7), torch.randn(5)]
    torch.library.opcheck(torch.ops.vpns.select_threshold.default, (scores, 20, backend))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LISTS, st.floats(0.001, 1.0))
def test_the_native_selection_equals_the_sort(values: list[list[float]], density: float) -> None:
    scores = [torch.tensor(row, dtype=torch.float32) for row in values]
    if sum(tensor.numel() for tensor in scores) == 0:
        with pytest.raises(ValueError, match="expected at least one score, got none"):
            select_threshold(scores, density)
    else:
        assert found(scores, density, "cpu") == found(scores, density, "reference")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(WIDE, min_size=1, max_size=40), st.data())
def test_every_count_can_be_kept(values: list[float], data: st.DataObject) -> None:
    scores = [torch.tensor(values, dtype=torch.float32)]
    kept = data.draw(st.integers(1, len(values)))
    threshold, ties_kept, counted = select_threshold(scores, kept=kept)
    magnitude = scores[0].abs()
    assert counted == kept
    assert float(threshold) == float(magnitude.sort(descending=True).values[kept - 1])
    assert int((magnitude > threshold).sum()) + int(ties_kept) == kept


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_results_are_bitwise_equal_for_any_thread_count(kind: str) -> None:
    # More than one piece of the native selection, and a part of one.
    generator = torch.Generator().manual_seed(5)
    scores = [torch.randn(size, generator=generator) for size in (700_001, 64, 300_000)]
    if kind == "ties":
        scores = [(tensor * 8).round() / 8 for tensor in scores]
    expected = found(scores, 0.1, "reference")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(found(scores, 0.1, "cpu") == expected for _ in range(5))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_anywhere_is_refused(backend: str, sign: float) -> None:
    for tensor, place in ((0, 0), (0, 6), (1, 300_000)):
        scores = [torch.randn(7), torch.randn(300_001)]
        scores[tensor][place] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
        with pytest.raises(ValueError, match="expected scores without NaN"):
            select_threshold(scores, 0.5, backend=backend)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_density_outside_zero_to_one_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"expected a density in \(0, 1\], got"):
        select_threshold([torch.randn(9)], density)


@pytest.mark.parametrize("kept", [0, -1, 10])
def test_a_count_that_cannot_be_kept_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= kept <= 9"):
        select_threshold([torch.randn(9)], kept=kept)


def test_density_and_count_exclude_each_other() -> None:
    for arguments in ({}, {"density": 0.5, "kept": 3}):
        with pytest.raises(ValueError, match="expected either density or kept"):
            select_threshold([torch.randn(9)], **arguments)


@pytest.mark.parametrize("scores", [[], [torch.empty(0)], [torch.empty(0, 3), torch.empty(2, 0)]])
def test_no_scores_are_refused(scores: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected at least one score, got none"):
        select_threshold(scores, 0.5)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="expected scores of one dtype and device"):
        select_threshold([torch.randn(3), torch.randn(3, dtype=torch.float64)], 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_the_reference_and_say_so_elsewhere(dtype: torch.dtype) -> None:
    scores = [torch.tensor([0.5, -2.0, 1.0], dtype=dtype)]
    threshold, ties_kept, kept = select_threshold(scores, 0.5)
    assert (float(threshold), int(ties_kept), kept) == (1.0, 1, 2)
    assert threshold.dtype == dtype
    with pytest.raises(NotImplementedError, match="it takes float32 CPU scores"):
        select_threshold(scores, 0.5, backend="cpu")


@pytest.mark.parametrize(
    ("count", "density", "kept"), [(10, 0.25, 3), (10, 0.35, 4), (3, 0.5, 2), (7, 1e-9, 1)]
)
def test_the_count_is_rounded_half_up_and_at_least_one(count: int, density: float, kept: int) -> None:
    assert select_threshold([torch.randn(count)], density)[2] == kept


def test_channels_last_scores_select_the_same() -> None:
    scores = torch.randn(8, 3, 5, 5)
    dense, strided = [scores], [scores.contiguous(memory_format=torch.channels_last)]
    assert found(dense, 0.3, "cpu") == found(strided, 0.3, "cpu")


def test_scores_with_a_gradient_are_read_and_left_alone() -> None:
    scores = torch.nn.Parameter(torch.randn(20))
    threshold, _, _ = select_threshold([scores], 0.5)
    assert not threshold.requires_grad
    assert scores.grad is None
