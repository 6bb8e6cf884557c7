"""Does --check pass where kernels agree with the reference, and stop the run where they do not?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import vpns.stages.check
from vpns.complaint import CheckError
from vpns.observe import Checked, Observer
from vpns.run import execute
from vpns.stages.exactness import Exactness
from vpns.state import load_state
from vpns_kernels.sparse_modules import SparseConv2d


class Seen(Observer):
    def __init__(self) -> None:
        self.checked: list[Checked] = []

    def on_check(self, checked: Checked) -> None:
        self.checked.append(checked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "channel"])
def test_both_stages_agree_with_the_reference(
    tiny_task: ModuleType, tmp_path: Path, pattern: str, dtype: str
) -> None:
    config, seen = tiny_task.make_config(pattern=pattern, dtype=dtype, density=0.5), Seen()
    execute(tmp_path, config, "tune", [seen], checks=True)
    assert [(one.stage, one.iterations) for one in seen.checked] == [("search", 9), ("tune", 9)]
    assert all(0 < one.share <= 1 for one in seen.checked)


def test_a_checked_run_ends_as_one_that_is_not(tiny_task: ModuleType, tmp_path: Path) -> None:
    for name, checks in (("checked", True), ("plain", False)):
        execute(tmp_path / name, tiny_task.make_config(), "tune", checks=checks)
    for file in ("search/scores.safetensors", "tune/weights.safetensors", "tune/prompt.safetensors"):
        assert (tmp_path / "checked" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


def test_a_relu_that_a_rounding_turns_is_no_error_but_a_wrong_kernel_is() -> None:
    def judge(ours: Sequence[float], theirs: Sequence[float]) -> float:
        exactness = Exactness("search", floor=1e-5)
        for iteration, errors in enumerate(zip(ours, theirs, strict=True)):
            exactness.add("a", iteration, *errors, 1.0)
            exactness.add("b", iteration, 1e-6, 4e-3 if iteration == 7 else 1e-6, 1.0)
        return exactness.judge()

    exact = [1e-6] * 20
    turned = [*exact[:12], *[3e-3] * 8]
    for ours in (exact, turned):
        assert judge(ours, exact) < 1
        assert judge(ours, turned) < 1
    with pytest.raises(CheckError, match=r"search, iteration 2: .* gradient of a within 1\.4e-05"):
        judge([*exact[:2], *[5e-5] * 18], exact)
    with pytest.raises(CheckError, match=r"search, iteration 19: .* gradient of a within 0\.016"):
        judge([*exact[:19], 0.02], exact)
    with pytest.raises(CheckError, match="iteration 3: expected a finite gradient of a, got nan"):
        judge([*exact[:3], float("nan"), *exact[4:]], exact)


def test_a_gradient_that_is_off_stops_the_stage_before_it_begins_and_is_named(
    tiny_task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolve = SparseConv2d._convolve

    def distorted(self: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = convolve(self, x, residual)
        return y + 1e-3 * (y - y.detach()) if self.geometry.in_channels == 8 else y

    monkeypatch.setattr(SparseConv2d, "_convolve", distorted)
    config = tiny_task.make_config()
    with pytest.raises(CheckError, match=r"tune, iteration 0: expected the gradient of network\.conv"):
        execute(tmp_path, config, "tune", checks=True)
    assert load_state(tmp_path / "tune") is None
    monkeypatch.undo()
    assert "tune" in execute(tmp_path, config, "tune", checks=True)


def test_a_mask_that_differs_away_from_the_threshold_stops_the_stage(
    tiny_task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = vpns.stages.check._compare_masks

    def spoiled(kernels: Any, reference: Any, where: str) -> None:
        refresh = kernels.refresh

        def wrong() -> object:
            chosen = refresh()
            kernels.predictor.network.conv2.mask.logical_not_()
            return chosen

        object.__setattr__(kernels, "refresh", wrong)
        compare(kernels, reference, where)

    monkeypatch.setattr(vpns.stages.check, "_compare_masks", spoiled)
    with pytest.raises(CheckError, match=r"search, iteration 0: expected the reference's mask of conv2"):
        execute(tmp_path, tiny_task.make_config(), "search", checks=True)
    assert torch.is_grad_enabled()
