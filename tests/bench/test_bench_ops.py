"""Does the bench of the ops time right results only, and does its report say what its rows say?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_ops
from vpns_kernels import ConvGeometry, parse_pattern
from vpns_kernels.measure import layer_bench
from vpns_kernels.measure.layer_bench import Variant, bench_layer, bench_selection
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import measurement_lock

CONV = Layer("conv", ConvGeometry(16, 24, (3, 3), padding=(1, 1)), 6, 5, count=2)
LINEAR = Layer("fc", ConvGeometry(20, 12, (1, 1)), 1, 1)
EAGER = ["torch float32", "torch bfloat16"]


def row(**changes: Any) -> dict[str, Any]:
    """A row of a report as the targets read it."""
    ratios = {name: {"median": value} for name, value in changes.pop("ratios", {}).items()}
    base = {"network": "resnet18", "kernel_size": [3, 3], "density": 0.1, "batch": 16, "dtype": "float32"}
    return base | {"pattern": "unstructured", "best_dense": "torch float32", "ratios": ratios} | changes


@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
def test_a_layer_gives_a_row_for_each_variant(layer: Layer) -> None:
    variants = [
        Variant(parse_pattern(spec), density, dtype)
        for spec in ("unstructured", "block:4x4", "channel")
        for density in (0.25, 1.0)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rows = bench_layer(layer, 3, variants, EAGER, rounds=2)
    for found, variant in zip(rows, variants, strict=True):
        assert (found["pattern"], found["density"]) == (variant.pattern.spec, variant.density)
        assert found["dtype"] == str(variant.dtype)[6:]
        assert found["weight_density"] == pytest.approx(variant.density, abs=0.06)
        assert set(found["dense"]) == set(found["ratios"]) == set(EAGER)
        assert found["best_dense"] == min(EAGER, key=lambda name: found["dense"][name]["median_ms"])
        assert found["sparse"]["rounds"] == 2
        flops = layer.geometry.flops(3, layer.height, layer.width)
        assert found["gflops_dense_equivalent"] == pytest.approx(flops / found["sparse"]["median_ms"] / 1e6)
        effective = found["gflops_dense_equivalent"] * found["weight_density"]
        assert found["gflops_effective"] == pytest.approx(effective)
    json.dumps(rows)


def test_a_mask_keeps_exactly_the_units_that_the_density_says() -> None:
    for spec, units in (("unstructured", 24 * 16 * 9), ("block:4x8", 6 * 2 * 9)):
        pattern = parse_pattern(spec)
        mask = layer_bench.make_mask(CONV, CONV.build(), Variant(pattern, 0.1, torch.float32))
        assert int((pattern.reduce_sum(mask.float()) > 0).sum()) == int(0.1 * units + 0.5)
        other = layer_bench.make_mask(CONV, CONV.build(), Variant(pattern, 0.1, torch.float32, seed=1))
        assert not torch.equal(mask, other)


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_bench.make_sparse

    def wrong(dense: Any, mask: torch.Tensor, variant: Variant) -> Any:
        packed = right(dense, mask, variant)
        with torch.no_grad():
            packed.values[0] += 1
        return packed

    monkeypatch.setattr(layer_bench, "make_sparse", wrong)
    monkeypatch.setattr(layer_bench, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="expected the outputs of conv"):
        bench_layer(CONV, 2, [Variant(parse_pattern("unstructured"), 0.3, torch.float32)], EAGER, 2)


def test_the_selection_is_checked_and_timed_against_kthvalue() -> None:
    found = bench_selection([CONV, LINEAR], 0.1, rounds=2)
    assert found["scores"] == 2 * 16 * 24 * 9 + 20 * 12
    assert found["select_threshold"]["rounds"] == found["torch.kthvalue"]["rounds"] == 2
    assert found["speedup_low"] <= found["speedup"] <= found["speedup_high"]


def test_targets_are_the_mean_and_least_ratio_of_the_best_form() -> None:
    rows = [
        row(ratios={"torch float32": 2.0, "torch bfloat16": 9.0}),
        row(ratios={"torch float32": 0.5, "torch bfloat16": 9.0}),
        row(pattern="block:16x16", ratios={"torch float32": 3.0, "torch bfloat16": 4.0}),
        row(pattern="block:16x16", ratios={"torch float32": 2.0, "torch bfloat16": 1.0}),
        row(pattern="block:32x32", dtype="bfloat16", ratios={"torch float32": 1.0, "torch bfloat16": 1.5}),
        # Not judged: other layers, densities, batches, networks; bf16 against fp32.
        row(kernel_size=[1, 1], ratios={"torch float32": 0.1}),
        row(density=0.2, ratios={"torch float32": 0.1}),
        row(batch=1, ratios={"torch float32": 0.1}),
        row(network="vgg16", ratios={"torch float32": 0.1}),
        row(dtype="bfloat16", ratios={"torch float32": 100.0}),
    ]
    found = {(t["name"].split()[0], t["name"].split(" against ")[1]): t for t in bench_ops.targets(rows)}
    suffix = "ResNet-18's 3x3 layers, batch 16"
    mean = found["block", f"torch bfloat16, {suffix}: geometric mean"]
    assert (mean["value"], mean["form"], mean["met"]) == (pytest.approx(2.0), "block:16x16 float32", True)
    least = found["block", f"torch bfloat16, {suffix}: minimum"]
    assert (least["value"], least["wanted"], least["met"]) == (1.0, "> 1", False)
    assert found["block", f"best dense, {suffix}: minimum"]["value"] == 2.0
    mean = found["unstructured", f"torch float32, {suffix}: geometric mean"]
    assert (mean["value"], mean["met"]) == (pytest.approx(1.0), False)
    assert found["unstructured", f"torch float32, {suffix}: minimum"]["value"] == 0.5


def test_targets_that_were_not_measured_are_not_met() -> None:
    found = bench_ops.targets([])
    assert len(found) == 6
    assert all(target["value"] is None and not target["met"] for target in found)


def test_the_command_writes_a_report_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = "conv 8 16 3 3 1 1 1 5 5 1\nfc 8 5 1 1 1 0 1 1 1 1\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "resnet18.txt").write_text(tiny)
    monkeypatch.setattr(bench_ops, "LISTS", tmp_path / "lists")
    monkeypatch.setattr(layer_bench, "_GEMM_SIZE", 32)
    # Not the machine's own lock, which a measurement may hold.
    monkeypatch.setattr(bench_ops, "measurement_lock", lambda: measurement_lock(tmp_path / "lock"))
    path = tmp_path / "results" / "ops.json"
    bench_ops.main(["--json", str(path), "--quick", "--rounds", "2", "--patterns", "unstructured,block:4x4"])
    report = json.loads(path.read_text())
    assert report["schema_version"] == 1
    assert {"cpu", "threads", "versions", "commit", "dirty"} <= set(report["fingerprint"])
    assert [(r["layer"], r["pattern"], r["dtype"]) for r in report["rows"]] == [
        ("conv", spec, dtype) for spec in ("unstructured", "block:4x4") for dtype in ("float32", "bfloat16")
    ]
    assert all(r["network"] == "resnet18" and r["ceiling_share"] > 0 for r in report["rows"])
    assert [target["value"] is not None for target in report["targets"]] == [True] * 6
    assert list(path.parent.iterdir()) == [path]
    printed = capsys.readouterr().out
    assert printed.count("| resnet18 | conv |") == 4
    assert "select_threshold, 1,192 scores" in printed
    assert all(target["name"] in printed for target in report["targets"])


@pytest.mark.parametrize("options", [["--layers", "alexnet"], ["--dtypes", "float16"], []])
def test_a_bad_command_line_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", str(tmp_path / "a.json"), *options] if options else []
    with pytest.raises(SystemExit) as stopped:
        bench_ops.main(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or not options
