"""Does a command that cannot have been meant so stop in one line, before it starts or loses any work?"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import vpns.data.check
from vpns.cli import EXIT_ERROR, main, parse
from vpns.complaint import EXIT_INTERRUPTED
from vpns.config import RunConfig
from vpns.data import download
from vpns.report_options import find_comparison

Capture = pytest.CaptureFixture[str]
TINY = ("--model.name=tiny_task:build", "--model.source_classes=12", "--prompt.canvas=16", "--prompt.frame=2",
        "--pretrain.epochs=0", "--search.epochs=1", "--tune.epochs=1", "--threads=1")  # fmt: skip


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_task: ModuleType) -> Path:
    """A current folder with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_photos(root: Path, *classes: str, count: int = 8) -> None:
    noise = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name / f"{number}.png")


def expect_error(capsys: Capture, arguments: list[str], *parts: str) -> None:
    assert main(arguments) == EXIT_ERROR
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("command", ["eval", "export", "bench", "report"])
def test_what_looks_at_a_run_starts_none(command: str, desk: Path, capsys: Capture) -> None:
    expect_error(capsys, [command, "nope"], f"{command}: expected the folder of a run, got nope")
    assert not Path("nope").exists()


@pytest.mark.parametrize("command", ["run", "eval"])
def test_the_folder_of_a_sweep_is_no_run(command: str, capsys: Capture) -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text("{}")
    expect_error(capsys, [command, "sweep", *TINY], "expected the folder of a run, got sweep of a sweep")
    assert {path.name for path in Path("sweep").iterdir()} <= {"sweep.json", "run.lock"}


def test_options_of_a_comparison_may_stand_anywhere() -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text("{}")
    for options in (["--debug", "sweep"], ["sweep", "--debug"], ["--output", "o", "a", "b"], ["a", "b"]):
        assert find_comparison(["report", *options]) == options
    for options in (["a"], ["a", "--seed", "3"], ["--debug", "a"]):
        assert find_comparison(["report", *options]) is None


def test_settings_that_came_to_nothing_are_nobodys_defaults(capsys: Capture) -> None:
    assert main(["pretrain", "run", *TINY, "--density=0.5", "--model.name=tiny_task:absent"]) == EXIT_ERROR
    assert parse(["pretrain", "run"]).config == RunConfig()
    assert main(["pretrain", "run", *TINY, "--density=0.5"]) == 0
    assert parse(["pretrain", "run"]).config.density == 0.5


@pytest.mark.parametrize(
    "text", ["{}", '{"schema_version": 1}', '{"schema_version": 1, "config": {"old": 1}}']
)
def test_a_run_or_a_sweep_of_something_else_is_named(text: str, capsys: Capture) -> None:
    for folder, file in (("run", "run.json"), ("sweep", "sweep.json")):
        Path(folder).mkdir()
        Path(folder, file).write_text(text)
    expect_error(capsys, ["report", "run"], "run.json")
    if text == "{}":
        expect_error(capsys, ["report", "sweep"], "sweep.json")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method=random", "--schedule=mask_then_prompt"], ("expected scores and a prompt",)),
        (["--pretrain.epochs=2"], ("source_classes=52 to learn letters", "got 12")),
        (["--data.name=digts"], ("data.name", "got 'digts'")),
        (["--data.name=folder", "--data.root=one"], ("every class in every split", "'owl' (1 images)")),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    options: list[str], parts: tuple[str, ...], capsys: Capture
) -> None:
    make_photos(Path("one"), "cat", "dog")
    make_photos(Path("one"), "owl", count=1)
    for dry in ([], ["--dry-run"]):
        expect_error(capsys, ["run", "run", *TINY, *options, *dry], *parts)


def test_a_dry_run_counts_the_letters_too(capsys: Capture) -> None:
    options = ["--model.source_classes=52", "--pretrain.epochs=1", "--dry-run"]
    assert main(["run", "run", *TINY, *options]) == 0
    assert "(pretrain " in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(capsys: Capture) -> None:
    Path("folder.json").mkdir()
    for file in ("folder.json", "/proc/nope/bench.json"):
        command = [
            "bench",
            "--model=tiny_task:build",
            "--size=16",
            "--opponents=torch float32",
            f"--json={file}",
        ]
        expect_error(capsys, command, "cannot write")


def test_a_cluster_without_ray_is_refused(capsys: Capture) -> None:
    Path("grid.yaml").write_text("grid: {seed: [1]}\n")
    command = ["sweep", "grid.yaml", "--ray-address=10.0.0.9:6379"]
    expect_error(capsys, command, "expected --on ray beside --ray-address")


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [("model: [tiny_task:build, resnt18]", "resnt18"), ("data: [digits, digts]", "digts")],
)
def test_a_mistyped_name_stops_a_sweep_before_its_first_run(choice: str, wrong: str, capsys: Capture) -> None:
    settings = "{model: {source_classes: 12}, pretrain: {epochs: 0}, prompt: {canvas: 16, frame: 2}}"
    Path("grid.yaml").write_text(f"settings: {settings}\ngrid: {{{choice}}}\n")
    expect_error(capsys, ["sweep", "grid.yaml", "--threads=1", "--workers=1"], f"got '{wrong}'")
    assert not Path("runs").exists()


def test_settings_of_an_experiment_that_are_no_yaml_are_named(capsys: Capture) -> None:
    Path("bad.yaml").write_text("a: [1, 2\n")
    expect_error(capsys, ["reproduce", "arms", "--config", "bad.yaml"], "expected YAML in bad.yaml")


def test_splits_of_other_names_are_not_left_out_in_silence(capsys: Capture) -> None:
    for split in ("train", "valid"):
        make_photos(Path("photos", split), "cat", "dog")
    assert main(["data", "check", "photos"]) == EXIT_ERROR
    assert "named train, val and test in" in capsys.readouterr().out
    Path("photos/valid").rename("photos/val")
    for number in range(3):
        Path(f"photos/val/cat/{number}.avif").touch()
    assert main(["data", "check", "photos"]) == 0
    assert "3 files of other types are not read" in capsys.readouterr().out


def test_data_that_are_there_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(Path("photos"), "cat", "dog")
    options = ["--data.name=folder", "--data.root=photos", "--download"]
    monkeypatch.setattr(download, "download_data", None)
    assert main(["pretrain", "run", *TINY, *options]) == 0


def test_ctrl_c_ends_a_command_that_is_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    make_photos(Path("photos"), "cat", "dog")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vpns.data.check, "check_data", stop)
    assert main(["data", "check", "photos"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "vpns: interrupted\n"


def test_a_factory_that_ends_the_process_is_blamed(desk: Path, capsys: Capture) -> None:
    Path("leaving.py").write_text("import sys\ndef build(num_classes):\n    sys.exit('bye')\n")
    options = ["--model.name=leaving:build", "--model.source_classes=12", "--pretrain.epochs=0"]
    expect_error(capsys, ["pretrain", "run", *options], "leaving:build", "SystemExit: bye")


def test_debug_shows_where_a_comparison_fails(capsys: Capture) -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text(json.dumps({"schema_version": 0}))
    assert main(["report", "sweep", "--debug"]) == EXIT_ERROR
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_to_bench_that_is_none_is_told_what_it_may_be(capsys: Capture) -> None:
    expect_error(capsys, ["bench", "nope"], "got nope, which is not there (it may also be an artifact's;")
    Path("empty").mkdir()
    expect_error(capsys, ["bench", "empty"], "got empty, which holds no run.json")
    expect_error(capsys, ["report", "empty"], "(vpns run FOLDER makes a run)")


def test_what_a_network_cannot_be_given_is_named(capsys: Capture) -> None:
    Path("narrow.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))\n"
        "def number(num_classes):\n"
        "    return num_classes\n"
    )
    command = ["bench", "--opponents=torch float32", "--model"]
    assert main([*command, "narrow:build", "--size=9"]) == EXIT_ERROR
    last = capsys.readouterr().err.splitlines()[-1]
    assert "expected a network that takes images [N, 3, 9, 9], got 'narrow:build'" in last
    expect_error(capsys, [*command, "narrow:number"], "to return a torch.nn.Module, got int")
    expect_error(capsys, [*command, "narrow:build", "--device=abacus"], "cpu or cuda, got 'abacus'")
