"""Are layers and ops of training checked before they are timed, pass by pass?"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from bench import train_layers, train_sparseprop
from bench.train_layers import PASSES, Form, bench_passes
from bench.train_ops import bench_batch_norm, bench_prompt, bench_refresh, extra_mb
from tests.bench.training_rows import CONV, LINEAR
from vpns_kernels import ConvGeometry, parse_pattern
from vpns_kernels.measure.layers import Layer
from vpns_kernels.ops import prompt_conv2d


@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
def test_a_layer_gives_three_passes_for_each_form(layer: Layer) -> None:
    forms = [
        Form(stage, pattern, 0.25, dtype)
        for stage in ("tune", "search")
        for pattern in ("unstructured", "block:4x4")
        for dtype in ("float32", "bfloat16")
    ]
    rows = bench_passes(layer, 3, forms, rounds=2)
    for row, form in zip(rows, forms, strict=True):
        assert (row["stage"], row["pattern"], row["dtype"]) == (form.stage, form.pattern, form.dtype)
        assert row["weight_density"] == pytest.approx(0.25, abs=0.06)
        assert set(row["ours"]) == set(row["ratios"]["float32"]) == set(PASSES)
        assert len(row["backends"]) == 3
    json.dumps(rows)


def test_sparseprop_is_timed_where_its_form_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(conv: torch.nn.Module, x: Tensor) -> torch.nn.Module:
        asked.append(x.shape)
        return conv

    monkeypatch.setattr(train_sparseprop, "find_sparseprop", find)
    forms = [Form("tune", "unstructured", 0.25, dtype) for dtype in ("float32", "bfloat16")]
    full, half = bench_passes(CONV, 3, forms, rounds=2)
    assert len(asked) == 1
    assert full["sparseprop"]["backward_ms"] > 0
    assert full["sparseprop"]["backward"]["median"] > 0
    assert half["sparseprop"] is None


def test_values_and_masks_change_between_rounds_and_keep_their_number() -> None:
    pattern = parse_pattern("unstructured")
    weight = torch.randn(CONV.geometry.weight_shape)
    sparse = train_layers._build(CONV, Form("tune", "unstructured", 0.25, "float32"), weight)
    version = sparse.learned._version
    sparse.renew()
    assert sparse.learned._version > version
    kept = pattern.reduce_sum((torch.rand(CONV.geometry.weight_shape) < 0.3).float()) > 0
    moved = train_layers._move(kept)
    assert int(moved.sum()) == int(kept.sum())
    assert not torch.equal(moved, kept)


def test_a_wrong_pass_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = train_layers.masked_conv2d
    monkeypatch.setattr(train_layers, "masked_conv2d", lambda *args: right(*args) * 1.1)
    monkeypatch.setattr(train_layers, "interleave_phases", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="expected the forward of conv"):
        bench_passes(CONV, 2, [Form("search", "unstructured", 0.3, "float32")], 2)


@pytest.mark.parametrize("variant", ["framed", "released"])
def test_the_prompt_is_timed_by_pass_against_torch(variant: str) -> None:
    row = bench_prompt(ConvGeometry(3, 8, (3, 3), (2, 2), (1, 1)), variant, 2, 16, 2, rounds=2)
    assert set(row["arms"]) == {"ours float32", "ours bfloat16", "torch float32", "torch bfloat16"}
    phases = {"forward", "prompt_gradient", "weight_gradient", "total"}
    assert set(row["arms"]["ours float32"]) == set(row["ratios"]["ours float32"]["torch bfloat16"]) == phases
    assert row["canvas_mb"] == pytest.approx(2 * 3 * 16 * 16 * 4 / 1e6)


def test_a_canvas_in_memory_is_seen() -> None:
    image = torch.zeros(16, 3, 224, 224, dtype=torch.uint8)
    prompt, weight = torch.zeros(3, 224, 224), torch.randn(4, 3, 7, 7)
    geometry = ConvGeometry(3, 4, (7, 7), (8, 8), (3, 3))

    def make(count: int, backend: str) -> Tensor:
        return prompt_conv2d(image[:count], prompt, weight, geometry, 16, "released", backend=backend)

    canvas_mb = 16 * 3 * 224 * 224 * 4 / 1e6
    dense = extra_mb(lambda count: make(count, "reference"), 16, prompt)
    if dense is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert dense["forward"] > canvas_mb
    assert dense["prompt_gradient"] > canvas_mb


def test_batch_norm_and_refresh_are_checked_and_timed() -> None:
    norm = bench_batch_norm(8, 4, 2, "bfloat16", rounds=2)
    assert set(norm["ratios"]["ours"]["torch"]) == {"forward", "backward", "total"}
    chosen = bench_refresh([CONV, LINEAR], 0.1, rounds=2)
    assert chosen["case"].startswith("7,152 scores")
    assert set(chosen["arms"]) == {
        "torch.kthvalue",
        "torch.kthvalue and masks",
        "select_threshold",
        "refresh_mask",
    }
