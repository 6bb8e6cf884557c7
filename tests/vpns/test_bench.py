"""Does `vpns bench --model` take every kind of network, measure it, and write what it found?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.readme import render_whole
from vpns import cli, deploy
from vpns.bench import bench_model, measure, to_text
from vpns.bench.subject import load_subject
from vpns.bench_options import BenchOptions, find_bench, parse_bench
from vpns.run import execute
from vpns_kernels.measure import on_gpu
from vpns_kernels.measure.timing import interleave
from vpns_kernels.measure.whole_network import Clock

MINE = ["bench", "--model", "tiny_task:build", "--size", "16", "--batch", "2", "--rounds", "6", "--quick"]


def test_options_have_their_defaults_and_take_lists() -> None:
    assert parse_bench(["--model", "resnet18"]) == BenchOptions(("resnet18",))
    found = parse_bench(
        ["--model=x", "--pattern=block,channel", "--density=0.2,0.1", "--batch", "1,16", "--quick",
         "--opponents", "torch float32, openvino bfloat16"]
    )  # fmt: skip
    assert found.patterns == ("block", "channel")
    assert found.densities == (0.2, 0.1)
    assert found.batches == (1, 16)
    assert found.opponents == ("torch float32", "openvino bfloat16")
    assert (found.seeds, found.rounds) == (1, 10)
    with pytest.raises(ValueError, match="expected seeds >= 1, got 0"):
        parse_bench(["--model=x", "--seeds=0"])
    assert "openvino bfloat16" in (parse_bench(["--model=x", "--quick"]).opponents or ())


def test_the_bench_stage_of_a_run_is_another_command() -> None:
    assert find_bench(["bench", "--quick", "--model=x"]) == ["--quick", "--model=x"]
    assert find_bench(["bench", "runs/demo", "--model.name", "x"]) is None
    assert find_bench(["run", "--model", "x"]) is None


def test_a_report_is_printed_written_and_drawn(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "bench.json"
    arguments = [
        "--pattern=block:4x4,channel",
        "--density=0.5",
        "--opponents=torch float32",
        "--dtype=float32",
    ]
    threads = torch.get_num_threads()
    assert cli.main([*MINE, *arguments, "--json", str(target), "--threads=1"]) == 0
    assert torch.get_num_threads() == threads
    report: dict[str, Any] = json.loads(target.read_text())
    assert report["schema_version"] == 1
    assert report["machine"]["threads"] == 1
    assert {"cpu", "versions", "commit", "dirty"} <= report["machine"].keys()
    assert [cell["pattern"] for cell in report["cells"]] == ["block:4x4", "channel"]
    first = report["cells"][0]
    for key in ("sparse_ms", "dense", "best_dense", "speedup", "max_rel_err", "pattern", "density", "batch"):
        assert report[key] == first[key]
    assert {"name", "value", "wanted", "met"} == report["targets"][0].keys()
    assert target.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    row = "| tiny_task:build, 16 px, batch 2, block:4x4 |"
    assert row in render_whole(target)
    printed = capsys.readouterr().out
    assert "## tiny_task:build, block:4x4 at density 0.5, 16 px, batch 2" in printed
    assert "not all were measured that may be the best" in printed
    assert "| conv2 | 8→8 3x3 @8x8 | 0.500 |" in printed


def test_a_run_and_its_artifact_are_measured_as_they_were_pruned(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(tmp_path, tiny_task.make_config(), "export")
    run, artifact = (load_subject(str(path)) for path in (tmp_path, tmp_path / "export" / "artifact"))
    for subject, size in ((run, 16), (artifact, 12)):
        assert subject.is_pruned
        assert (subject.pattern, subject.density, subject.size) == ("unstructured", 0.3, size)
    # The artifact takes images, and puts them into the prompt's frame itself.
    stored, expected = artifact.network.get_submodule("network").state_dict(), run.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    assert artifact.engine is not None
    assert artifact.engine.plan.native
    assert find_bench(["bench", str(tmp_path)]) is None
    asked = [
        "bench",
        str(tmp_path / "export" / "artifact"),
        "--batch=2",
        "--rounds=6",
        "--opponents=torch float32",
    ]
    assert cli.main(asked) == 0
    assert "tiny_task:build, unstructured at density 0.3, 12 px, batch 2" in capsys.readouterr().out
    assert cli.main([*asked, "--size=16"]) == 2
    assert "expected --size 12 of 'tiny_task:build', got [16]" in capsys.readouterr().err
    assert cli.main([*asked, "--density=0.1"]) == 2
    assert "expected no --pattern and --density" in capsys.readouterr().err


def fake_gpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """The CPU where a GPU is looked for, with the CPU's clock and no compiler among the opponents."""
    monkeypatch.setattr(module, "find_gpu", lambda name: torch.device("cpu"))
    clock = Clock(interleave, on_gpu._layers, on_gpu._take)
    for place in (on_gpu, measure):
        monkeypatch.setattr(place, "gpu_clock", lambda device: clock)
    monkeypatch.setitem(on_gpu._MAKERS, on_gpu.AUTOTUNED, on_gpu._eager)


def test_a_gpu_has_opponents_of_its_own(tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, measure)
    report = bench_model(parse_bench([*MINE[1:], "--device=cuda", "--density=0.5", "--pattern=block:4x4"]))
    (cell,) = report["cells"]
    assert set(cell["dense"]) == set(on_gpu.GPU_OPPONENTS)
    assert cell["best_dense_counts"]
    assert report["settings"]["device"] == "cuda"
    assert {row["best_dense"] for row in cell["layers"] if row["density"] is not None} == {"torch"}
    assert "tiny_task:build, block:4x4 at density 0.5" in to_text(report)
    # This project's own goals are nothing to who measures a network of his own, but by the JSON.
    assert report["targets"]
    assert "MISSED" not in to_text(report)
    assert "Goals" not in to_text(report)
    assert "Goals of this project" in to_text(report, has_goals=True)


def test_a_run_on_a_gpu_is_measured_there_too(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_task.make_config()
    execute(tmp_path, config, "export")
    # A device that torch has everywhere and that is no CPU; what is measured on it has tests of its own.
    monkeypatch.setattr(deploy, "find_gpu", lambda name: torch.device("meta"))
    monkeypatch.setattr(deploy, "gpu_fingerprint", lambda device: {"gpu": str(device)})
    monkeypatch.setattr(deploy, "bench_network", lambda network, pattern, x: (x.device.type, x.shape[-1]))
    on_cpu = deploy.bench_run(tmp_path, config)["networks"]
    found = deploy.bench_run(tmp_path, replace(config, device="cuda"))
    assert found["machine"] == {"gpu": "meta"}
    assert found["networks"] == on_cpu + [("meta", size) for _, size in on_cpu]
    assert {device for device, _ in on_cpu} == {"cpu"}


def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--model", "tiny_task:build", "--device", "cuda"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vpns: error: bench: expected a GPU that torch can use as 'cuda', got 0")
    assert cli.main(["bench", "--model", "tiny_task:build", "--device", "cuda", "--threads", "2"]) == 2
    assert "expected threads >= 1 of a CPU, got 2 on cuda" in capsys.readouterr().err


def test_names_of_torchvision_are_known() -> None:
    subject = load_subject("squeezenet1_1")
    assert not subject.is_pruned
    assert not subject.network.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet1000"], "to be a network's, or 'module:factory', got 'resnet1000'"),
        (["--model", "tiny_task:build", "--pattern", "hexagons"], "parse_pattern: expected one of"),
        (["--model", "tiny_task:build", "--density", "0"], "expected density in (0, 1]"),
        (["--model", "tiny_task:build", "--batch", "many"], "expected --batch as int, got 'many'"),
        (["--model", "tiny_task:build", "--batch", "0"], "expected batch >= 1"),
        (["--model", "tiny_task:build", "--dtype", "int4"], "expected dtype auto, float32 or bfloat16"),
        (["--model", "tiny_task:build", "--size=16", "--opponents", "tensorrt"], "expected names of"),
        (["--model", "tiny_task:build", "--denstiy", "0.1"], "denstiy"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vpns: error: ")
    assert message in last
