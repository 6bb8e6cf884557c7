"""Does explain say what runs, and does an automatic layer run what was chosen?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vpns_kernels import ConvGeometry, explain, parse_pattern, runners
from vpns_kernels.choose import Choice, choose, query_of, this_machine
from vpns_kernels.convert import mask_layers
from vpns_kernels.cost import LayerQuery
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear


def pruned(density: float, spec: str = "unstructured", **options: Any) -> nn.Conv2d:
    torch.manual_seed(3)
    conv = nn.Conv2d(64, 64, **({"kernel_size": 3, "padding": 1} | options))
    pattern = parse_pattern(spec)
    units = torch.rand(pattern.units_shape(tuple(conv.weight.shape))) < density
    with torch.no_grad():
        conv.weight.mul_(pattern.expand(units, tuple(conv.weight.shape)))
    return conv


def test_a_sparse_layer_a_pruned_layer_and_a_query_are_explained_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    conv = pruned(0.1)
    by_zeros = explain(conv, (16, 28, 28))
    sparse = SparseConv2d.from_dense(conv)
    assert explain(sparse, (16, 28, 28), quiet=True) == by_zeros
    assert explain(by_zeros.query, quiet=True) == by_zeros
    assert by_zeros.query.density == pytest.approx(0.1, abs=0.01)
    printed = capsys.readouterr().out
    assert printed.strip() == str(by_zeros).strip()
    for text in ("64→64 3x3 @28x28, batch 16", "break-even density", "multiply-adds", "dense float32"):
        assert text in printed
    assert "→ " + by_zeros.choice.kernel in printed
    assert by_zeros.choice.reason in printed


def test_what_can_run_comes_first_and_refusals_are_few_lines() -> None:
    found = explain(pruned(0.1), (16, 28, 28), quiet=True)
    able, _, refused = str(found).partition("cannot run this layer:\n")
    rows = [line[2:].split() for line in able.splitlines() if line[2:].startswith(("unstructured", "dense"))]
    times = [float(row[1] if row[0] != "dense" else row[2]) for row in rows]
    assert times == sorted(times)
    assert "block" not in able
    assert len(refused.splitlines()) <= 5
    names = {c.kernel for c in found.choice.candidates if c.estimate is None}
    assert all(name in refused for name in names)
    assert "±: by how much an estimate may be off" in able
    is_carried = any(c.estimate and not c.estimate.measured for c in found.choice.candidates)
    assert ("measured: false: nobody has" in able) == is_carried


def test_a_masked_layer_is_explained_by_its_mask_and_pattern() -> None:
    masked = mask_layers(nn.Sequential(nn.Conv2d(32, 32, 3)), parse_pattern("block:16x16"))
    layer = masked[0]
    layer.mask.zero_()
    layer.mask.view(-1)[:9] = True
    found = explain(layer, (1, 9, 9), quiet=True).query
    assert found.values_sizes == (9, 16, 16)
    assert found.density == pytest.approx(9 / 36)


def test_the_zeros_of_a_torch_layer_are_packed_by_the_pattern_that_is_named() -> None:
    conv, blocks = pruned(0.25, "block:16x16"), parse_pattern("block:16x16")
    assert explain(conv, (1, 9, 9), pattern=blocks, quiet=True).query.format == "block"
    assert explain(conv, (1, 9, 9), quiet=True).query.format == "unstructured"


def test_linear_layers_take_a_batch() -> None:
    linear = nn.Linear(20, 10)
    found = explain(linear, (5,), torch.bfloat16, quiet=True)
    assert (found.query.size, found.query.dtype, found.query.layer_class) == ((5, 1, 1), "bfloat16", "linear")
    assert "dense bfloat16" in str(found)


@pytest.mark.parametrize("size", [None, (1, 2), (3,)])
def test_a_size_that_does_not_fit_is_refused(size: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match="expected size"):
        explain(pruned(0.5), size)


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a convolution or a linear layer, got ReLU"):
        explain(nn.ReLU(), (1, 2, 3))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "channel"])
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_an_automatic_layer_runs_what_was_chosen(spec: str, density: float) -> None:
    conv, x = pruned(density, spec) if spec != "channel" else pruned(1.0), torch.randn(4, 64, 14, 14)
    layer = SparseConv2d.from_dense(conv, pattern=parse_pattern(spec))
    chosen = choose(query_of(layer.geometry, x.shape, layer.values, x.dtype), this_machine()).kernel
    if layer.kernel_for(x) != "compact":
        assert layer.kernel_for(x) == chosen
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)
    forced = SparseConv2d.from_dense(conv, pattern=parse_pattern(spec), kernel="sparse")
    assert forced.kernel_for(x) != "dense"
    torch.testing.assert_close(forced(x), conv(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_that_runs_dense_equals_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "choose", lambda *_, **__: Choice("dense", 1.0, 1.0, "", ()))
    conv = pruned(0.3, stride=2).to(dtype)
    layer, x = SparseConv2d.from_dense(conv, act="relu"), torch.randn(2, 64, 9, 9, dtype=dtype)
    residual = torch.randn(2, 64, 5, 5, dtype=dtype)
    assert layer.kernel_for(x) == "dense"
    # Memory formats differ, and with them the order of sums.
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(layer(x), conv(x).relu(), **close)
    torch.testing.assert_close(layer(x, residual), (conv(x) + residual).relu(), **close)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    # The dense weight is not kept beyond a change.
    layer.values.mul_(2)
    conv.weight.mul_(2)
    torch.testing.assert_close(layer(x), conv(x).relu(), **close)
    linear = nn.Linear(24, 10, dtype=dtype)
    flat = torch.randn(3, 24, dtype=dtype)
    torch.testing.assert_close(SparseLinear.from_dense(linear)(flat), linear(flat), **close)


def test_with_gradients_no_choice_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "choose", lambda *_, **__: pytest.fail("asked"))
    layer = SparseConv2d.from_dense(pruned(0.1))
    layer(torch.randn(1, 64, 5, 5)).sum().backward()
    assert layer.values.grad is not None


def test_the_layer_classes_that_the_table_distinguishes() -> None:
    classes = {
        (ConvGeometry(3, 64, (7, 7), (2, 2), (3, 3)), 224): "stem",
        (ConvGeometry(64, 64, (3, 3), padding=(1, 1)), 56): "spatial",
        (ConvGeometry(64, 64, (1, 1)), 56): "pointwise",
        (ConvGeometry(64, 64, (1, 1)), 1): "linear",
        (ConvGeometry(64, 64, (3, 3), groups=64), 56): "grouped",
    }
    for (geometry, side), name in classes.items():
        assert LayerQuery(geometry, (1, side, side), (5,)).layer_class == name
