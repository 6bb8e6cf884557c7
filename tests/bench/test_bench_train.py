"""Does the bench of training run the trainer's own steps, and do its goals say what its rows say?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import bench_train, readme, train_layers, train_memory, train_runs
from bench.train_layers import PASSES, Form, bench_passes
from bench.train_loops import Arm, Cell, Sizes, build_loop, start_scores
from bench.train_memory import measure_memory
from bench.train_ops import bench_batch_norm, bench_prompt, bench_refresh, extra_mb
from bench.train_published import publish
from bench.train_steps import bench_iterations
from bench.train_table import table
from bench.train_targets import targets
from tests.vpns.released_transcription import Released, resnet18
from vpns.config import ModelConfig
from vpns.models import MODELS, build_model
from vpns_kernels import ConvGeometry, parse_pattern
from vpns_kernels.measure import Laps
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import measurement_lock
from vpns_kernels.modules import MaskedConv2d
from vpns_kernels.ops import prompt_conv2d
from vpns_kernels.sparse_modules import SparseConv2d

CONV = Layer("conv", ConvGeometry(16, 24, (3, 3), padding=(1, 1)), 6, 5, count=2)
LINEAR = Layer("fc", ConvGeometry(20, 12, (1, 1)), 1, 1)
SIZES = Sizes("tiny", canvas=16, frame=2, source_classes=12)
LIST = "conv1 3 8 3 3 2 1 1 16 16 1\nconv2 8 8 3 3 1 1 1 8 8 1\nfc 8 12 1 1 1 0 1 1 1 1\n"


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", tiny)


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def keeping_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C library does with memory is a matter of the whole process, here that of the tests."""
    for module in (bench_train, train_memory):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)


def make_ratio(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value}


def make_step(stage: str, form: str, density: float, ms: float, **ratios: float) -> dict[str, Any]:
    """A row of an iteration as the goals read it; names of engines with _ for their spaces and dots."""
    pattern, dtype = form.split()
    named = {name.replace("__", ".").replace("_", " "): make_ratio(v) for name, v in ratios.items()}
    base = {"stage": stage, "variant": "framed", "batch": 32, "canvas": 224, "who": "ours", "arm": form}
    base |= {"pattern": pattern, "dtype": dtype, "density": density, "start": "uniform", "prompt_in": "both"}
    return base | {"ratios": named, "why_not": None, "iteration": {"median_ms": ms}}


def find(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"].startswith(name))
    return row


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_the_opponent_is_the_published_scheme(stage: str) -> None:
    network = build_model(ModelConfig("resnet18"), 12, 3)
    released = Released(network.state_dict(), resnet18, canvas=32, frame=4, density=0.1)
    released.sequence = list(range(12))
    (released.begin_mask_finding if stage == "search" else released.begin_tuning)(1)
    for optimizer in released.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 if stage == "search" else 1e-3
    published = publish(network, stage, "released", 32, 4, 0.1, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for prompted in (True, False):
        images, labels = torch.rand(3, 3, 32, 32, generator=generator), torch.tensor([1, 0, 7])
        loss = released.update(images, labels, prompted)
        published.optimizer.zero_grad()
        # The network casts its answer to float32.
        logits = published.predictor.network((published_canvas(published, images, prompted) - MEAN) / STD)
        found = nn.functional.cross_entropy(logits, labels)
        assert found.item() == pytest.approx(loss, rel=1e-9)
        found.backward()
        published.optimizer.step()
        if published.threshold is not None:
            published.threshold.update()
            assert float(published.threshold.tau) == pytest.approx(released.tau, rel=1e-9)
    state = network.state_dict()
    for name, expected in released.state.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-7, atol=1e-9)
    for name, expected in released.scores.items():
        torch.testing.assert_close(state[f"{name}.scores"], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(published.predictor.prompt, released.prompt, rtol=1e-7, atol=1e-9)


MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)


def published_canvas(published: Any, images: Tensor, prompted: bool) -> Tensor:
    predictor = published.predictor
    return (images + predictor.prompt * predictor.frame_mask).clamp(0, 1) if prompted else images


@pytest.mark.parametrize("variant", ["released", "framed"])
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_iterations_are_the_trainers_own_and_mark_their_phases(stage: str, variant: str) -> None:
    arms = [Arm("torch", "float32", 0.25), Arm("torch", "bfloat16", 0.25)]
    arms += [Arm("ours", "float32", 0.25), Arm("ours", "bfloat16", 0.25, "block:4x4", prompt_in="none")]
    rows = bench_iterations(Cell(stage, variant, 4), arms, SIZES, rounds=2)
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    for row in rows:
        assert set(row["phases"]) == {"batch", "forward", "backward", "optimizer", "refresh"}
        assert row["updates"] == (2 if variant == "released" else 1)
        whole = row["iteration"]["median_ms"]
        assert row["ms_per_image"] == pytest.approx(whole / (4 * row["updates"]))
        assert set(row["ratios"]) == ({"torch float32", "torch bfloat16"} if row["who"] == "ours" else set())
    assert rows[2]["layer_density"] == pytest.approx({"0": 0.25, "3": 0.25, "6": 0.25}, abs=0.02)
    json.dumps(rows)


def test_an_iteration_learns_what_its_stage_learns(tmp_path: Path) -> None:
    for stage, layer in (("search", MaskedConv2d), ("tune", SparseConv2d)):
        loop = build_loop(Arm("ours", "float32", 0.25), Cell(stage, "framed", 4), SIZES, tmp_path)
        network = loop.learner.predictor.predictor.network
        assert isinstance(network[3], layer)
        learned = network[3].scores if stage == "search" else network[3].values
        before = learned.detach().clone()
        loop(Laps())
        assert not torch.equal(learned, before)
        assert network.training


def test_an_engine_that_stops_says_why_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: nn.Module, **_: Any) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no C++ compiler")

        return Broken()

    monkeypatch.setattr(torch, "compile", fail)
    arms = [
        Arm("torch.compile", "bfloat16", 0.25),
        Arm("torch", "float32", 0.25),
        Arm("ours", "float32", 0.25),
    ]
    rows = bench_iterations(Cell("search", "released", 4), arms, SIZES, rounds=1)
    assert rows[0]["why_not"] == "torch.compile stopped: no C++ compiler"
    assert rows[0]["iteration"] is None
    assert list(rows[2]["ratios"]) == ["torch float32"]


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


def test_memory_is_that_of_three_iterations_above_the_imports() -> None:
    wanted = {"cell": {"stage": "tune", "variant": "framed", "batch": 4}}
    wanted |= {"arm": {"who": "ours", "dtype": "float32", "density": 0.25}}
    found = measure_memory(json.dumps(wanted | {"sizes": vars(SIZES)}))
    assert 0 < found["imported_mb"] <= found["peak_mb"]
    assert found["added_mb"] == pytest.approx(found["peak_mb"] - found["imported_mb"], abs=1)


def test_runs_are_compared_with_the_reference_and_two_at_once_with_a_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[int, int]] = []

    class Fake(train_runs._Runs):
        def pretrain(self) -> None:
            started.append((0, 0))

        def finish(self, forms: Any, threads: int) -> None:
            started.append((len(forms), threads))
            for form in forms:
                self.stages.setdefault(form, []).append({"search": 2.0, "tune": 1.0})

    monkeypatch.setattr(train_runs, "_Runs", Fake)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    forms = [train_runs.FORMS[0], train_runs.REFERENCE]
    ours, reference, both = train_runs.bench_runs(1, (), forms)
    assert started == [(0, 0), (1, 4), (1, 4), (1, 4), (1, 4), (2, 2)]
    assert list(ours["ratios"]) == [reference["form"]] == ["reference unstructured float32"]
    assert reference["ratios"] == {}
    assert ours["stage_seconds"] == {"search": 2.0, "tune": 1.0}
    assert ours["runs_per_hour"] == pytest.approx(3600 / ours["seconds"])
    assert both["throughput"]["median"] == pytest.approx(both["sequence_seconds"] / both["seconds"])


@pytest.mark.long
def test_runs_go_through_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "vpns"))
    settings = ["--model.name=tiny_task:build", "--model.source_classes=12", "--prompt.canvas=16"]
    settings += ["--pretrain.epochs=0", "--search.epochs=1", "--tune.epochs=1", "--data.train_count=60"]
    rows = train_runs.bench_runs(1, settings, [train_runs.FORMS[0], train_runs.REFERENCE])
    assert all(row["seconds"] > 0 for row in rows)
    with pytest.raises(RuntimeError, match=r"expected a run to finish, got exit code 2.*epochs"):
        train_runs.bench_runs(1, ["--search.epochs=-1"])


def test_step_goals_take_the_fastest_engine_that_counts_and_name_what_is_missing() -> None:
    both = {"torch_float32": 4.0, "torch__compile_float32": 3.0, "torch_bfloat16": 2.0}
    failed = {"who": "torch.compile", "arm": "torch.compile bfloat16", "why_not": "stopped", "ratios": {}}
    rows = [
        make_step("tune", "unstructured float32", 0.2, 100.0, **both),
        make_step("tune", "unstructured float32", 0.1, 100.0, **both),
        make_step("tune", "block:32x32 bfloat16", 0.1, 100.0, torch_bfloat16=5.0),
        make_step("search", "block:32x32 bfloat16", 0.1, 400.0, torch_bfloat16=2.0),
        # Not judged: another batch, start, or prompt.
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"batch": 8},
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"start": "method"},
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"prompt_in": "none"},
        make_step("tune", "block:32x32 bfloat16", 0.1, 100.0) | failed,
    ]
    found = targets({"steps": rows})
    first = find(found, "training step, fixed mask: unstructured float32 at density 0.2")
    assert (first["value"], first["wanted"], first["met"]) == (3.0, ">= 2.2", True)
    assert first["against_fastest"] == 2.0
    assert not find(found, "training step, fixed mask: unstructured float32 at density 0.1")["met"]
    absent = find(found, "training step, fixed mask: unstructured float32 at density 0.05")
    assert absent["value"] is None
    assert "no row of tune framed" in absent["why"]
    alone = find(found, "training step, fixed mask: block")
    assert (alone["value"], alone["met"], alone["why"]) == (5.0, False, "torch.compile bfloat16: stopped")
    # (60 · 2 · 400 + 30 · 5 · 100) / (60 · 400 + 30 · 100)
    assert find(found, "pruning runs per hour at 224 px")["value"] == pytest.approx(63 / 27)


def test_layer_goals_are_geometric_means_over_3x3_layers() -> None:
    def layer(**changes: Any) -> dict[str, Any]:
        ratios = {name: make_ratio(changes.pop("ratio", 1.0)) for name in PASSES[:1]}
        ratios |= {"input_gradient": make_ratio(4.0), "weight_gradient": make_ratio(9.0)}
        base = {"stage": "tune", "pattern": "unstructured", "dtype": "float32", "density": 0.2}
        return base | {"kernel_size": [3, 3], "batch": 32, "ratios": {"float32": ratios}} | changes

    low = {"forward": make_ratio(1.0), "input_gradient": make_ratio(1.0), "weight_gradient": make_ratio(1.0)}
    rows = [layer(), layer(ratios={"float32": low})]
    rows += [layer(**one, ratios={"float32": low}) for one in ({"stage": "search"}, {"kernel_size": [1, 1]})]
    found = targets({"layers": rows})
    goal = find(found, "input gradient: unstructured float32 at density 0.2")
    assert (goal["value"], goal["least"], goal["layers"], goal["met"]) == (pytest.approx(2.0), 1.0, 2, False)
    kept = find(found, "kept-weight gradient: unstructured float32 at density 0.2")
    assert (kept["value"], kept["met"]) == (pytest.approx(3.0), True)
    assert find(found, "kept-weight gradient: unstructured float32 at density 0.1")["value"] is None


def test_goals_of_ops_and_runs_are_read_off_their_rows() -> None:
    def versus(value: float) -> dict[str, Any]:
        return {"forward": make_ratio(value), "prompt_gradient": make_ratio(4 * value)}

    prompt = {"op": "prompt_conv2d", "variant": "framed", "batch": 32, "canvas": 224, "canvas_mb": 20.0}
    prompt["ratios"] = {
        "ours float32": {"torch float32": versus(5.0), "torch bfloat16": versus(2.0)},
        "ours bfloat16": {"torch float32": versus(6.0), "torch bfloat16": versus(3.0)},
    }
    prompt["extra_mb"] = {"float32": {"forward": 1.0, "prompt_gradient": 15.0}, "bfloat16": None}
    chosen = {"op": "select_threshold", "case": "all", "scores": 11_678_912}
    chosen["arms"] = {"select_threshold": {"total": {"median_ms": 7.0}}}
    runs = [
        {"form": "a", "ratios": {"reference": make_ratio(3.5), "other": make_ratio(3.2)}},
        {"form": "b", "ratios": {"reference": make_ratio(9.0), "other": make_ratio(1.0)}},
        {"form": "reference", "ratios": {}},
        {"form": "two at once", "threads_each": 1, "throughput": make_ratio(0.9)},
    ]
    found = targets({"ops": [prompt, chosen], "runs": runs})
    forward = find(found, "prompt_conv2d framed, forward against")
    assert (forward["value"], forward["form"], forward["met"]) == (3.0, "ours bfloat16", True)
    assert find(found, "prompt_conv2d framed, prompt gradient against")["value"] == 12.0
    memory = [find(found, f"prompt_conv2d framed, {what}: extra") for what in ("forward", "prompt gradient")]
    assert [(row["value"], row["met"]) for row in memory] == [(0.05, True), (0.75, False)]
    assert find(found, "prompt_conv2d released, forward against")["value"] is None
    assert find(found, "select_threshold")["met"]
    embedded = find(found, "pruning runs per hour, letters")
    assert (embedded["value"], embedded["form"], embedded["met"]) == (3.2, "a", True)
    assert not find(found, "two runs at once")["met"]
    assert find(found, "training kernels, unstructured float32, against SparseProp")["why"]


def test_every_goal_has_its_row_and_says_why_it_has_no_value() -> None:
    rows = targets({})
    assert len({row["name"] for row in rows}) == len(rows) == 27
    assert all(row["value"] is None and row["why"] and not row["met"] for row in rows)


def test_the_command_writes_a_report_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "resnet18.txt").write_text(LIST)
    monkeypatch.setattr(bench_train, "LISTS", tmp_path)
    monkeypatch.setattr(bench_train, "NORMS", ((4, 3),))
    monkeypatch.setattr(bench_train, "Sizes", lambda: SIZES)
    # Not the machine's own lock, which a measurement may hold.
    monkeypatch.setattr(bench_train, "measurement_lock", lambda: measurement_lock(tmp_path / "lock"))
    monkeypatch.setattr(
        bench_train, "bench_memory", lambda cell, arms, _: [{**vars(cell), "arm": "a", "added_mb": 1.0}]
    )
    monkeypatch.setattr(bench_train, "bench_runs", lambda *_: [])
    path = tmp_path / "results" / "train.json"
    arguments = ["--json", str(path), "--opponents", "eager", "--rounds", "2", "--batch", "2"]
    arguments += ["--densities", "0.1,0.5", "--batches", "2,3"]
    bench_train.main([*arguments, "--budget", "60"])
    report = json.loads(path.read_text())
    assert report["schema_version"] == 1
    assert {"cpu", "threads", "versions", "commit", "dirty"} <= set(report["fingerprint"])
    assert {row["op"] for row in report["ops"]} == {"prompt_conv2d", "select_threshold", "batch_norm_act"}
    # Two stages, patterns and dtypes at two densities.
    assert len(report["layers"]) == 3 * 2**4
    assert {(row["stage"], row["variant"]) for row in report["steps"]} == {
        (stage, variant) for stage in ("search", "tune") for variant in ("framed", "released")
    }
    assert {row["batch"] for row in report["steps"]} == {2, 3}
    assert len(report["memory"]) == 2
    assert sorted(path.parent.iterdir()) == [path, path.with_suffix(".svg")]
    printed = capsys.readouterr().out
    assert all(target["name"] in printed for target in report["targets"])
    assert "prompt and mask over mask alone, search framed" in printed
    bench_train.main([*arguments, "--budget", "0", "--only", "ops,runs"])
    report = json.loads(path.read_text())
    assert len(report["left_out"]) == 6
    assert "steps" not in report
    assert "left out for want of time: 6" in capsys.readouterr().out


def test_the_quick_report_measures_what_the_goals_read() -> None:
    options = bench_train.parse_arguments(["--json", "a.json", "--quick"])
    names = [job.name for job in bench_train.plan_steps(options)]
    assert names == [f"{cell} batch 32" for cell in ("search released", "tune framed", "search framed")]
    found = [job.measure.args[1] for job in bench_train.plan_steps(options)]  # type: ignore[attr-defined]
    assert [[arm.name for arm in arms if arm.who != "ours"] for arms in found] == [
        ["torch float32"],
        ["torch float32", "torch bfloat16"],
        ["torch bfloat16"],
    ]
    options = bench_train.parse_arguments(["--json", "a.json", "--quick", "--opponents", "eager,compile"])
    measured = bench_train.plan_steps(options)[0].measure.args[1]  # type: ignore[attr-defined]
    assert {arm.name for arm in measured if arm.who != "ours"} == set(bench_train.TWO_UPDATES)
    assert len(bench_train.plan_layers(options)) == 7
    assert len(bench_train.plan_layers(bench_train.parse_arguments(["--json", "a.json"]))) == 7 + 12 * 5


@pytest.mark.parametrize(
    "options",
    [["--only", "ops,networks"], ["--opponents", "onnx"], ["--densities", "0,0.1"], ["--batch", "0"], []],
)
def test_a_bad_command_line_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", str(tmp_path / "a.json"), *options] if options else []
    with pytest.raises(SystemExit) as stopped:
        bench_train.main(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or not options


def test_a_stopped_engine_stands_in_the_table_with_its_reason() -> None:
    row = make_step("search", "unstructured float32", 0.1, 1.0) | {"why_not": "stopped", "iteration": None}
    assert "| search framed, batch 32 | unstructured float32 | stopped |" in table(
        {"steps": [row], "targets": [], "left_out": []}
    )


def test_start_scores_are_uniform_or_those_of_the_method() -> None:
    network = build_model(ModelConfig("tiny"), 12, 0)
    pattern = parse_pattern("unstructured")
    uniform = start_scores(network, pattern, "uniform", 0)
    for scores in uniform.values():
        assert float((scores.abs() >= 0.5).double().mean()) == pytest.approx(0.5, abs=0.01)
    method = start_scores(network, pattern, "method", 0)
    assert set(method) == set(uniform)
    assert not torch.equal(method["0"], uniform["0"])


def test_the_readme_shows_whole_iterations_from_a_report(tmp_path: Path) -> None:
    engine = {"who": "torch", "arm": "torch float32", "ratios": {}}
    rows = [
        make_step("search", "unstructured float32", 0.1, 800.0) | engine,
        make_step("search", "block:32x32 bfloat16", 0.1, 200.0, torch_float32=4.0),
        make_step("search", "block:32x32 bfloat16", 0.2, 300.0, torch_float32=3.0),
        make_step("search", "block:32x32 bfloat16", 0.1, 1.0, torch_float32=3.0) | {"prompt_in": "none"},
        make_step("search", "block:32x32 bfloat16", 0.1, 1.0, torch_float32=3.0) | {"batch": 8},
    ]
    machine = {"date": "2026-01-02", "cpu": "Some CPU", "isa": ["avx2"], "threads": 2}
    path = tmp_path / "train-some.json"
    path.write_text(json.dumps({"steps": rows, "fingerprint": machine}))
    heading, _, head, _, *body = readme.render_training(path).splitlines()
    assert "2026-01-02, Some CPU, AVX2, 2 threads" in heading
    assert head == "| iteration | ours | torch float32 | over the fastest (95 %) |"
    assert body == ["| search framed, block:32x32, bfloat16 | 200 | 800 | 4.0x (4.0 to 4.0) |"]
