"""Does the command measure what the goals read, in order of weight, and report it?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bench_train, readme, train_memory
from bench.train_table import table
from tests.bench.training_rows import LIST, SIZES, make_step, tiny
from vpns.models import MODELS
from vpns_kernels.measure.timing import measurement_lock


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", tiny)


@pytest.fixture(autouse=True)
def keeping_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C library does with memory is a matter of the whole process, here that of the tests."""
    for module in (bench_train, train_memory):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)


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


def test_each_axis_is_covered_coarsely_before_the_rest() -> None:
    options = bench_train.parse_arguments(["--json", "a.json", "--budget", "13"])
    early: dict[tuple[str, str], set[tuple[float, int]]] = {}
    for job in bench_train.plan_steps(options):
        cell, arms = job.measure.args[:2]  # type: ignore[attr-defined]
        if job.rank <= 1 and cell.variant == "framed":
            for arm in arms:
                if arm.who == "ours" and arm.start == "uniform" and arm.prompt_in == "both":
                    early.setdefault((cell.stage, f"{arm.pattern} {arm.dtype}"), set()).add(
                        (arm.density, cell.batch)
                    )
    wanted = {(density, 32) for density in bench_train.DENSITIES} | {(0.1, 8), (0.1, 128)}
    for stage in ("search", "tune"):
        for form in ("unstructured float32", "block:32x32 bfloat16"):
            assert early[stage, form] == wanted


def test_the_table_shows_how_iterations_scale() -> None:
    ours = {"phases": {}, "iteration": dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 1.0)}
    rows = [
        make_step("tune", "unstructured float32", density, ms)
        | ours
        | {"batch": batch, "ms_per_image": ms / batch}
        for density, batch, ms in ((0.1, 32, 320.0), (0.2, 32, 640.0), (0.1, 8, 96.0))
    ]
    printed = table({"steps": rows, "targets": [], "left_out": []})
    assert "| ms per image, batch 32 | density 0.1 | density 0.2 |" in printed
    assert "| tune unstructured float32 | 10.0 | 20.0 |" in printed
    assert "| ms per image, density 0.1 | batch 8 | batch 32 |" in printed
    assert "| tune unstructured float32 | 12.0 | 10.0 |" in printed


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


def test_the_readme_shows_whole_iterations_from_a_report(tmp_path: Path) -> None:
    engine = {"who": "torch", "arm": "torch float32", "ratios": {}}
    rows = [
        make_step("search", "unstructured float32", 0.1, 800.0) | engine,
        make_step("search", "block:32x32 bfloat16", 0.1, 200.0, torch_float32=4.0),
        make_step("search", "block:32x32 bfloat16", 0.2, 300.0, torch_float32=3.0),
        make_step("search", "block:32x32 bfloat16", 0.1, 1.0, torch_float32=3.0) | {"prompt_in": "none"},
        make_step("search", "block:32x32 bfloat16", 0.1, 1.0, torch_float32=3.0) | {"batch": 8},
    ]
    machine = {"date": "2026-01-02", "cpu": "Some CPU", "isa": ["avx2"], "threads": 2, "commit": "0" * 40}
    path = tmp_path / "train-some.json"
    path.write_text(json.dumps({"steps": rows, "fingerprint": machine}))
    heading, _, head, _, *body = readme.render_training(path).splitlines()
    assert "2026-01-02, Some CPU, AVX2, 2 threads, commit 0000000;" in heading
    assert head == "| iteration | ours | torch float32 | over the fastest (95 %) |"
    assert body == ["| search framed, block:32x32, bfloat16 | 200 | 800 | 4.0x (4.0 to 4.0) |"]
