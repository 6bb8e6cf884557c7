"""Does the bench of the ops time right results only, and does its report say what its rows say?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_ops
from bench.targets import targets
from vpns_kernels import ConvGeometry, parse_pattern
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.measure import layer_bench
from vpns_kernels.measure.layer_bench import Variant, bench_layer, bench_selection, roofline
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import measurement_lock

CONV = Layer("conv", ConvGeometry(16, 24, (3, 3), padding=(1, 1)), 6, 5, count=2)
LINEAR = Layer("fc", ConvGeometry(20, 12, (1, 1)), 1, 1)
EAGER = ["torch float32", "torch bfloat16"]


def row(**changes: Any) -> dict[str, Any]:
    """A row of a report as the targets read it."""
    ratios = {
        name: {"median": value, "low": value - 0.1} for name, value in changes.pop("ratios", {}).items()
    }
    base = {"network": "resnet18", "layer": "conv", "kernel_size": [3, 3], "density": 0.1, "batch": 16}
    base |= {"dtype": "float32", "asked": "sparse", "kernel": "some_avx512", "weight_density": 0.1}
    base |= {"pattern": "unstructured", "best_dense": "torch float32", "ratios": ratios, "packed_ms": 0.5}
    return base | {"sparse": {"median_ms": 1.0, "rounds": 31}, "roofline": {"share": 0.7}} | changes


def found_targets(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {target["name"].partition(", ResNet")[0]: target for target in targets(rows)}


@pytest.fixture(autouse=True)
def keeping_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C library does with memory is a matter of the whole process, here that of the tests."""
    monkeypatch.setattr(bench_ops, "keep_freed_memory", lambda: True)


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
        assert found["dtype"] == dtype_name(variant.dtype)
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


def test_ratio_targets_are_the_mean_of_the_best_form() -> None:
    rows = [
        row(ratios={"torch float32": 2.0, "torch bfloat16": 9.0}),
        row(ratios={"torch float32": 0.5, "torch bfloat16": 9.0}),
        row(pattern="block:16x16", ratios={"torch float32": 3.0, "torch bfloat16": 40.0}),
        row(pattern="block:16x16", ratios={"torch float32": 2.0, "torch bfloat16": 10.0}),
        row(pattern="block:32x32", dtype="bfloat16", ratios={"torch float32": 1.0, "torch bfloat16": 1.5}),
        # Not judged: other layers, densities, batches, networks; what a layer chose by itself.
        row(kernel_size=[1, 1], ratios={"torch float32": 0.1}),
        row(density=0.5, ratios={"torch float32": 0.1}),
        row(batch=1, ratios={"torch float32": 0.1}),
        row(network="vgg16", ratios={"torch float32": 0.1}),
        row(asked="auto", ratios={"torch float32": 100.0}),
    ]
    found = found_targets(rows)
    block = found["block at density 0.1 against torch bfloat16"]
    assert (block["value"], block["form"], block["met"]) == (pytest.approx(20), "block:16x16 float32", True)
    assert (block["least"], block["packed"], block["wanted"]) == (10, pytest.approx(40), ">= 5")
    best = found["block at density 0.1 against best dense"]
    assert (best["value"], best["met"]) == (pytest.approx(6**0.5), False)
    plain = found["unstructured at density 0.1 against torch float32"]
    assert (plain["value"], plain["least"], plain["met"]) == (pytest.approx(1.0), 0.5, False)
    assert found["unstructured at density 0.2 against torch float32"]["value"] is None


def test_channels_are_judged_by_the_ratio_of_flops_and_layers_by_their_roofline() -> None:
    rows = [
        row(pattern="channel", weight_density=0.25, ratios={"torch float32": 4.0}),
        row(pattern="channel", weight_density=0.1, ratios={"torch float32": 8.1}, roofline={"share": 0.4}),
    ]
    found = found_targets(rows)
    channel = found["channel over the ratio of FLOPs, float32"]
    assert (channel["value"], channel["least"], channel["met"]) == (pytest.approx(0.9), 0.81, True)
    assert found["channel over the ratio of FLOPs, bfloat16"]["value"] is None
    share = found["each layer: share of the lower of its compute and traffic roofline, least"]
    assert (share["value"], share["met"]) == (0.4, False)


def test_what_a_layer_chooses_by_itself_is_judged_by_the_lower_end_of_the_interval() -> None:
    rows = [
        row(asked="auto", ratios={"torch float32": 1.3}),
        row(asked="auto", density=0.5, ratios={"torch float32": 1.05}),
        row(asked="auto", kernel="dense", ratios={"torch float32": 1.06}),
        # Too few rounds to tell.
        row(asked="auto", sparse={"median_ms": 1.0, "rounds": 5}, ratios={"torch float32": 0.2}),
        row(ratios={"torch float32": 0.3}),
    ]
    by_choice = {("dense is chosen" in t["name"]): t for t in targets(rows) if t["name"].startswith("auto")}
    assert by_choice[False]["value"] == pytest.approx(0.95)
    assert not by_choice[False]["met"]
    assert by_choice[False]["slower"] == ["resnet18 conv batch 16 unstructured 0.5 float32"]
    assert (by_choice[True]["value"], by_choice[True]["met"]) == (pytest.approx(0.96), True)


def test_targets_that_were_not_measured_are_not_met() -> None:
    found = targets([])
    assert len(found) == 3 * 5 + 2 + 1 + 2
    assert all(target["value"] is None and not target["met"] for target in found)
    assert all({"name", "value", "wanted", "met"} <= set(target) for target in found)


def test_what_matters_most_is_measured_first_and_the_rest_is_named() -> None:
    options = bench_ops.parse_arguments(["--json", "a.json"])
    cells = sorted(bench_ops.grid(options), key=lambda cell: cell.rank)
    assert [cell.name for cell in cells[:2]] == [
        "resnet18 layer1.0.conv1 batch 16 density 0.1",
        "resnet18 layer2.0.conv1 batch 16 density 0.1",
    ]
    assert len(cells) == (12 + 24 + 12) * 3 * 6
    assert cells[-1].network == "vgg16"
    quick = bench_ops.grid(bench_ops.parse_arguments(["--json", "a.json", "--quick"]))
    assert {cell.density for cell in quick} == {0.2, 0.1, 0.05}
    assert all(bench_ops.is_3x3(cell.layer) and cell.batch == 16 for cell in quick)


def test_a_roofline_is_bound_by_work_or_by_traffic() -> None:
    base = row(kernel="block_avx512", gflops_effective=50.0, least_mb=1.0)
    found = roofline(base, {"float32": 100.0, "bfloat16": 400.0}, 10.0)
    assert found == {"floor_ms": pytest.approx(0.5), "bound_by": "compute", "share": pytest.approx(0.5)}
    assert roofline(base | {"least_mb": 8.0}, {"float32": 100.0, "bfloat16": 400.0}, 10.0)["share"] == 0.8
    tiles = base | {"kernel": "block_avx512_bf16", "dtype": "bfloat16"}
    assert roofline(tiles, {"float32": 100.0, "bfloat16": 400.0}, 10.0)["floor_ms"] == pytest.approx(0.125)


def test_the_command_writes_a_report_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = "conv 8 16 3 3 1 1 1 5 5 1\nfc 8 5 1 1 1 0 1 1 1 1\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "resnet18.txt").write_text(tiny)
    monkeypatch.setattr(bench_ops, "LISTS", tmp_path / "lists")
    monkeypatch.setattr(layer_bench, "_COPY_FLOATS", 1024)
    # Not the machine's own lock, which a measurement may hold.
    monkeypatch.setattr(bench_ops, "measurement_lock", lambda: measurement_lock(tmp_path / "lock"))
    path = tmp_path / "results" / "ops.json"
    arguments = ["--json", str(path), "--layers", "resnet18", "--rounds", "2", "--densities", "0.1,0.5"]
    bench_ops.main([*arguments, "--patterns", "unstructured,block:4x4", "--batches", "2"])
    report = json.loads(path.read_text())
    assert report["schema_version"] == 2
    assert {"cpu", "threads", "versions", "commit", "dirty"} <= set(report["fingerprint"])
    rows = [r for r in report["rows"] if (r["layer"], r["density"]) == ("conv", 0.1)]
    assert [(r["pattern"], r["dtype"], r["asked"]) for r in rows] == [
        (spec, dtype, asked)
        for spec in ("unstructured", "block:4x4")
        for dtype in ("float32", "bfloat16")
        for asked in ("sparse", "auto")
    ]
    assert all(r["network"] == "resnet18" and r["roofline"]["share"] > 0 for r in report["rows"])
    assert all(r["kernel"] != "dense" for r in rows if r["asked"] == "sparse")
    assert report["copy_gb_per_s"] > 0
    assert sorted(path.parent.iterdir()) == [path, path.with_suffix(".svg")]
    printed = capsys.readouterr().out
    assert printed.count("| resnet18 | conv |") == 16
    assert "select_threshold, 1,192 scores" in printed
    assert all(target["name"] in printed for target in report["targets"])
    bench_ops.main([*arguments, "--budget", "0"])
    assert len(json.loads(path.read_text())["left_out"]) == 2 * 3 * 2
    assert "left out for want of time: 12 cells" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--layers", "alexnet"], ["--dtypes", "float64"], []])
def test_a_bad_command_line_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", str(tmp_path / "a.json"), *options] if options else []
    with pytest.raises(SystemExit) as stopped:
        bench_ops.main(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or not options
