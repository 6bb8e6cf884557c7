"""Triton's channel_mask: gradients against the definition in float64, empty batches, splits of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpns_kernels import channel_mask
from vpns_kernels.ops._triton import columns
from vpns_kernels.ops.channel_mask import triton
from vpns_kernels.testing import poisoned_memory

SHAPES = [(2, 37, 5, 7), (33, 70), (0, 8, 3, 3), (1, 1, 1, 1), (5, 16, 30, 9)]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    scores = torch.randn(shape[1], generator=generator).to(device).requires_grad_()
    mask = (torch.rand(shape[1], generator=generator) < 0.5).to(device)
    keep = mask.view(1, -1, *(1,) * (x.dim() - 2))
    with poisoned_memory():
        leaf = x.clone().requires_grad_()
        y = channel_mask(leaf, scores, mask, "triton")
        grad_x, grad_scores = torch.autograd.grad(y, (leaf, scores), grad)
    assert torch.equal(y, x * keep)
    assert torch.equal(grad_x, grad * keep)
    products = (x.double() * grad.double()).transpose(0, 1).flatten(1)
    error = (grad_scores.double() - scores.double().sign() * products.sum(1)).abs()
    assert bool((error <= 1e-6 * products.abs().sum(1)).all())


def test_only_what_is_wanted_is_written(device: torch.device) -> None:
    x, scores = torch.randn(2, 5, 3, 3, device=device), torch.randn(5, device=device)
    mask = torch.tensor([True, False, True, True, False], device=device)
    for wants in ([True, False], [False, True], [True, True]):
        found = triton.run_backward(x, x, scores, mask, wants)
        assert [tensor.numel() > 0 for tensor in found] == wants


# The interpreter multiplies by NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_masked_infinity_becomes_nan_as_in_the_reference(device: torch.device) -> None:
    x = torch.tensor([[1.0, float("inf")]], device=device)
    mask = torch.tensor([True, False], device=device)
    found = channel_mask(x, torch.ones(2, device=device), mask, "triton")
    assert found.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (9000, 3), (700, 130), (9, 4200)], ids=str)
def test_rows_are_summed_the_same_way_each_time(
    shape: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few programs that 4,200 columns are many.
    monkeypatch.setattr(columns, "_PROGRAMS", 8)
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    with poisoned_memory():
        sums: Tensor = columns.sum_rows(parts)
        assert torch.equal(sums, columns.sum_rows(parts))
    error = (sums.double() - parts.double().sum(0)).abs()
    assert bool((error <= 2e-7 * parts.double().abs().sum(0)).all())


def test_every_row_belongs_to_one_split() -> None:
    for rows in (0, 1, 63, 64, 65, 1000, 12544, 3_211_264):
        for channels in (1, 16, 17, 64, 512, 2048, 802_816):
            for most in (1, 512):
                tiles = columns.pick_tiles(rows, channels, most)
                assert tiles.splits * tiles.rows_per_split >= rows
                assert rows == 0 or (tiles.splits - 1) * tiles.rows_per_split < rows
                assert tiles.splits <= most
                assert tiles.rows_per_split % tiles.block_m == 0
