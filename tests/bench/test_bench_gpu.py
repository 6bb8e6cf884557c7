"""Do the parts of a GPU report hold what they should? Checked without a GPU: by other backends, on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import bench_gpu
from bench.bench_gpu import PARTS, main, measure_part, plan
from bench.gpu_layers import bench_gpu_layer
from bench.gpu_networks import bench_gpu_network, make_dense
from bench.gpu_ops import bench_gpu_batch_norm, bench_gpu_prompt, bench_gpu_selection
from bench.gpu_passes import PASSES
from bench.gpu_report import finish_row, latest, merge, table
from bench.gpu_targets import AUTOTUNED, CUDNN, PATTERN, gpu_targets
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.measure.gpu import gpu_fingerprint, interleave_recorded, measure_gpu_ceilings
from vpns_kernels.measure.layers import Layer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CEILINGS = {"bfloat16_tflops": 800.0, "copy_tb_per_s": 4.0}
LAYER = Layer("conv", ConvGeometry(8, 8, (3, 3), padding=(1, 1)), 6, 6)


def layer_row(phase: str, density: float, **changes: Any) -> dict[str, Any]:
    ratios = {CUDNN: {"median": 4.0}, AUTOTUNED: {"median": 3.0}}
    base = {
        "stage": "tune",
        "pass": phase,
        "pattern": PATTERN,
        "density": density,
        "kernel_size": [3, 3],
        "in_channels": 128,
    }
    return base | {"ratios": ratios, "copy_frac": 0.5} | changes


def find(rows: list[dict[str, Any]], start: str) -> dict[str, Any]:
    (found,) = (row for row in rows if row["name"].startswith(start))
    return found


def test_layer_goals_count_the_faster_opponent_and_large_3x3_layers_alone() -> None:
    rows = [
        layer_row("forward", 0.1),
        layer_row("forward", 0.1, in_channels=64, ratios={CUDNN: {"median": 0.1}}),
        layer_row("input_gradient", 0.2, ratios={CUDNN: {"median": 2.0}}),
        layer_row("weight_gradient", 0.2, ratios={CUDNN: {"median": 2.0}}),
    ]
    found = gpu_targets({"layers": rows})
    goal = find(found, f"forward of {PATTERN} at density 0.1")
    assert (goal["value"], goal["wanted"], goal["met"]) == (pytest.approx(3.0), ">= 3.3", False)
    goal = find(found, f"input gradient of {PATTERN} at density 0.2")
    assert (goal["value"], goal["met"]) == (pytest.approx(2.0), False)
    assert find(found, f"weight gradient of {PATTERN} at density 0.2")["met"]
    absent = find(found, f"forward of {PATTERN} at density 0.05")
    assert (absent["value"], absent["met"], absent["why"]) == (None, False, "not measured")


def test_a_goal_against_the_compiler_is_not_met_where_it_was_not_measured() -> None:
    layer = layer_row("forward", 0.1, ratios={CUDNN: {"median": 9.0}})
    assert not find(gpu_targets({"layers": [layer]}), f"forward of {PATTERN} at density 0.1")["met"]
    row = {"model": "resnet18", "pattern": PATTERN, "density": 0.1, "ratios": {CUDNN: {"median": 9.0}}}
    goal = find(gpu_targets({"networks": [row]}), f"resnet18, {PATTERN} at density 0.1")
    assert (goal["met"], goal["why"]) == (False, f"no row has {AUTOTUNED}")
    row["ratios"] = {AUTOTUNED: {"median": 3.0}}
    assert find(gpu_targets({"networks": [row]}), f"resnet18, {PATTERN} at density 0.1")["met"]


def test_pointwise_layers_may_reach_the_bandwidth_or_the_ratio() -> None:
    slow = layer_row("forward", 0.1, kernel_size=[1, 1], ratios={CUDNN: {"median": 1.1}}, copy_frac=0.85)
    fast = layer_row("forward", 0.1, kernel_size=[1, 1], ratios={CUDNN: {"median": 3.4}}, copy_frac=0.2)
    assert find(gpu_targets({"layers": [slow, fast]}), "1x1 layers")["value"] == pytest.approx(0.85)
    assert not find(gpu_targets({"layers": [slow | {"copy_frac": 0.7}]}), "1x1 layers")["met"]


def test_selection_and_steps_have_goals() -> None:
    ops = [{"op": "select_threshold", "scores": 25_000_000, "ours": {"median_ms": 0.2}}]
    goal = find(gpu_targets({"ops": ops}), "select_threshold")
    assert (goal["value"], goal["wanted"], goal["met"]) == (0.2, "<= 0.1", False)
    step = {"stage": "tune", "who": "ours", "density": 0.1, "model": "resnet50", "iteration": {}}
    step["ratios"] = {"torch bfloat16": {"median": 1.7}}
    assert find(gpu_targets({"steps": [step]}), "tune iteration")["met"]


@pytest.mark.parametrize("stage", ["tune", "search"])
def test_each_pass_of_a_layer_is_checked_timed_and_compared(stage: str) -> None:
    arguments = (LAYER, 2, "block:4x4", (0.5, 0.25), CPU, 2, "reference", torch.float32)
    rows = bench_gpu_layer(*arguments, stage=stage)
    assert [(row["pass"], row["density"]) for row in rows] == [(p, d) for p in PASSES for d in (0.5, 0.25)]
    for row in rows:
        finish_row(row, CEILINGS)
        assert row["unit_density"] == pytest.approx(row["density"], abs=0.03)
        reads_all = (stage, row["pass"]) == ("search", "weight_gradient")
        assert row["weight_density"] == (1 if reads_all else row["unit_density"])
        assert row["ratios"][CUDNN]["median"] > 0
        assert row["roofline"]["floor_ms"] == pytest.approx(1e-3 * row["least_mb"] / 4.0)
        assert row["copy_frac"] == row["roofline"]["share"]
    json.dumps(rows)


def test_the_compiler_begins_anew_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: done.append("compile") or function)
    for _ in range(2):
        rows = bench_gpu_layer(
            LAYER, 2, "block:4x4", (0.5,), CPU, 1, "reference", torch.float32, is_autotuned=True
        )
        assert set(rows[0]["ratios"]) == {CUDNN, AUTOTUNED}
    assert done == ["reset", "compile"] * 2


def test_channels_are_timed_by_each_kernel_and_both_are_kept() -> None:
    kernels = ("compact", "reference")
    rows = [
        row
        for kernel in kernels
        for row in bench_gpu_layer(LAYER, 2, "channel", (0.5,), CPU, 2, kernel, torch.float32)
    ]
    assert [(row["kernel"], row["pass"]) for row in latest(rows)] == [(k, p) for k in kernels for p in PASSES]
    names = [name for name, _ in plan("layers", CPU)]
    for layer in ("resnet18 layer2.0.conv2", "resnet50 layer1.0.conv1"):
        assert {f"{layer} channel {kernel}" for kernel in ("triton", "compact")} <= set(names)


def test_ops_are_compared_with_torchs_own() -> None:
    rows = [
        bench_gpu_prompt(ConvGeometry(3, 4, (3, 3)), variant, 2, 16, 2, CPU, 2, "reference", torch.float32)
        for variant in ("framed", "released")
    ]
    rows.append(bench_gpu_batch_norm(4, 5, 2, CPU, 2, "reference", torch.float32))
    rows += bench_gpu_selection([LAYER], 0.1, CPU, 2, ["reference"])
    for row in rows:
        finish_row(row, CEILINGS)
        assert row["ours"]["rounds"] == 2
        assert row["copy_frac"] > 0
    json.dumps(rows)


def test_networks_are_compared_in_turn_and_say_why_each_layer_runs_so() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )
    forms = [("block:4x4", 0.5), ("channel", 0.5)]
    x = torch.randn(2, 3, 8, 8)
    dense = make_dense("tiny", network, x, is_autotuned=False)
    rows = [bench_gpu_network(dense, form, 2) for form in forms]
    assert [(row["pattern"], row["density"]) for row in rows] == forms
    for row in rows:
        assert set(row["ratios"]) == {CUDNN}
        assert row["max_rel_err"] < 3e-2
        assert all(layer["reason"] for layer in row["layers"])
    json.dumps(rows)


def test_parts_are_replaced_when_they_are_measured_again_and_the_table_names_what_is_missing() -> None:
    machine = {"device": "cuda:0", "commit": "abc"}
    part = {"fingerprint": machine, "ceilings": CEILINGS, "left_out": ["b"], "stopped": {"c": "OutOfMemory"}}
    ops = bench_gpu_selection([LAYER], 0.1, CPU, 1, ["reference"])
    report = merge({"parts": {}}, {"ops": part | {"rows": []}})
    report = merge(report, {"layers": part | {"rows": []}})
    report = merge(report, {"ops": part | {"rows": ops}})
    text = table(report)
    assert text.count("ops: cuda:0, commit abc") == 1
    assert "MISSED select_threshold, 576 scores" in text or "met    select_threshold, 576 scores" in text
    assert "stopped c: OutOfMemory" in text
    assert "left out for want of time: b" in text
    assert "not measured: 2" in text


def test_jobs_that_stop_say_why_and_what_was_measured_before_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_gpu, "measure_gpu_ceilings", lambda device: CEILINGS)

    def stops() -> list[dict[str, Any]]:
        raise RuntimeError("out of\n memory")

    def misplaces() -> list[dict[str, Any]]:
        raise AssertionError("base must be 16-byte aligned")

    def selects() -> list[dict[str, Any]]:
        return bench_gpu_selection([LAYER], 0.1, CPU, 1, ["reference"])

    saved: list[dict[str, Any]] = []
    measure_part([("a", selects), ("b", stops), ("c", misplaces), ("d", selects)], CPU, 60.0, saved.append)
    assert [len(found["rows"]) for found in saved] == [1, 1, 1, 1, 1]
    why = {"b": "RuntimeError: out of memory", "c": "AssertionError: base must be 16-byte aligned"}
    assert saved[-1]["stopped"] == why
    assert saved[-1]["rows"][0]["copy_frac"] > 0
    measure_part([("a", selects)], CPU, -1.0, saved.append)
    assert (saved[-1]["rows"], saved[-1]["left_out"]) == ([], ["a"])
    measure_part([("a autotuned", stops), ("b", selects)], CPU, 60.0, saved.append)
    assert (saved[-1]["left_out"], saved[-1]["stopped"]) == (["a autotuned"], {})


def test_what_is_measured_against_more_opponents_takes_the_place_of_what_was() -> None:
    first = layer_row("forward", 0.1, layer="a", ratios={CUDNN: {"median": 2.0}})
    again, other = layer_row("forward", 0.1, layer="a"), layer_row("forward", 0.1, layer="b")
    assert latest([first, other, again]) == [again, other]


def test_on_gpu_stops_without_a_gpu_and_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a GPU that torch can use, got none" in done.stderr
    assert not list(tmp_path.iterdir())


def test_on_gpu_bounds_what_is_always_run_by_the_whole_and_leaves_each_bench_time_to_write(
    tmp_path: Path,
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || echo "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": str(python)}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh")]
    first = ["test", "layers", "resnet50", "ops"]
    done = subprocess.run([*command, *first], env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()[:4]] == [["ok", name] for name in first]
    log = (tmp_path / "log.txt").read_text()
    assert "-m not long" in log
    assert [int(found) for found in re.findall(r"^-m .*--budget (\d+)", log, re.MULTILINE)] == [40, 45, 20]
    environment["LIMIT_S"] = "45"
    done = subprocess.run([*command, "ops"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ok      ops")
    budget = (tmp_path / "log.txt").read_text().split()[-1]
    assert 0 < int(budget) <= 5


def test_every_part_has_jobs_and_none_begins_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for part in PARTS:
        names = [name for name, _ in plan(part, CPU)]
        assert names
        assert len(names) == len(set(names))
    assert main(["ops", "--json", str(tmp_path / "gpu.json")]) == 2
    assert not list(tmp_path.iterdir())


def test_ceilings_and_fingerprint_are_plain_values() -> None:
    ceilings = measure_gpu_ceilings(CPU, 64, 1 << 16)
    assert all(value > 0 for value in ceilings.values())
    assert json.loads(json.dumps(gpu_fingerprint(CPU)))["versions"]["torch"] == torch.__version__


def test_samples_are_of_one_call_however_often_it_is_repeated() -> None:
    a = torch.ones(64, 64)
    found = interleave_recorded({"once": lambda: a @ a}, 3, CPU)["once"]
    assert len(found.times_ms) == 3
    assert 0 < found.median_ms < 50


def test_the_bench_needs_none_of_the_packages_that_a_gpu_machine_may_lack() -> None:
    missing = ("jsonargparse", "ray", "expecttest", "openvino", "torch_pruning", "onnx", "onnxruntime")
    code = (
        "import sys\n"
        f"for name in {missing}: sys.modules[name] = None\n"
        "import bench.bench_gpu\n"
        "assert 'vpns.cli' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
