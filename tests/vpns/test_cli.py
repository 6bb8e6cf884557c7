"""Does the command line give settings their say, errors one line, and Ctrl-C its exit code?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vpns import cli, run
from vpns.config import RunConfig, SearchConfig, flatten
from vpns.observe import End, EpochMetrics, Progress, StageStart, Step
from vpns.option_help import option_texts

TINY = [
    "--data.train_count=60",
    "--model.name=tiny_task:build",
    "--model.source_classes=12",
    "--prompt.canvas=16",
    "--prompt.frame=2",
    "--pattern=unstructured",
    "--density=0.3",
    "--pretrain.epochs=0",
    "--search.epochs=2",
    "--search.batch_size=20",
    "--tune.epochs=2",
    "--tune.batch_size=20",
    "--threads=1",
]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command prints."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vpns: error: ")
    return lines[0]


def config_of(arguments: list[str]) -> RunConfig:
    return cli.parse(arguments).config


def test_every_setting_is_described_where_help_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    printed = capsys.readouterr().out
    assert "<class 'vpns" not in printed
    # Lines are broken at blanks and hyphens.
    words = "".join(printed.split())
    texts = option_texts(RunConfig)
    assert set(flatten(RunConfig().to_dict())) <= set(texts)
    assert all("".join(text.split()) in words for text in texts.values())
    # Of what a stage inherits: at its own name, with its own default.
    assert texts["search.lr"] == "learning rate."
    assert texts["tune.schedule"] == texts["pretrain.schedule"]


def test_without_options_the_settings_are_the_defaults(tmp_path: Path) -> None:
    assert cli.parse(["run", str(tmp_path)]) == cli.Asked(tmp_path, "run", RunConfig())
    asked = cli.Asked(Path("x"), "search", RunConfig(), checks=True)
    assert cli.parse(["search", "--run-folder", "x", "--debug", "--check"]) == asked
    assert cli.parse(["eval", "--run_folder=x"]).folder == Path("x")


def test_options_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("density: 0.5\nsearch:\n  lr: 0.25\n  epochs: 9\ndata:\n  train_count: null\n")
    config = config_of(["run", "x", "--config", str(file), "--search.epochs", "4"])
    assert config == RunConfig(density=0.5, search=SearchConfig(lr=0.25, epochs=4), data=config.data)
    assert config.data.train_count is None


def test_what_print_config_prints_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "x", "--density", "0.25", "--tune.optimizer", "adam", "--print_config"])
    file = tmp_path / "x.yaml"
    file.write_text(capsys.readouterr().out)
    config = config_of(["run", "y", "--config", str(file)])
    assert (config.density, config.tune.optimizer) == (0.25, "adam")
    assert cli.parse(["run", "y", "--config", str(file)]).folder == Path("y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "expected one run folder, got none"),
        (["run", "a", "--run-folder", "b"], "expected one run folder, got a and b"),
        (["run", "x", "--densty", "0.1"], "densty"),
        (["run", "x", "--search.epoch", "3"], "search.epoch"),
        (["run", "x", "--density", "lots"], "density"),
        (["run", "x", "--density", "0"], "expected density, the kept fraction, in (0, 1], got 0.0"),
        (["run", "x", "--density", "1.5"], "expected density, the kept fraction, in (0, 1], got 1.5"),
        (["run", "x", "--prompt.frame", "16"], "expected 0 <= 2 * frame < canvas=32, got frame=16"),
        (["run", "x", "--schedule", "whenever"], "schedule"),
        (["run", "x", "--config", "absent.yaml"], "absent.yaml"),
        (["prune", "x"], "prune"),
    ],
)
def test_a_bad_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(arguments, capsys)


def test_an_unknown_key_of_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("search:\n  learning_rate: 3\n")
    assert "learning_rate" in error_of(["run", "x", "--config", str(file)], capsys)
    file.write_text("search: [\n")
    assert "Problems parsing config" in error_of(["run", "x", "--config", str(file)], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.name=folder", "--data.root=/nowhere"], "expected an image folder, got /nowhere"),
        (["--method=magic"], "'random', 'vpns'], got 'magic'"),
        (["--model.name=tiny_task:linear"], "expected a model with convolutions"),
        (["--model.weights=absent.pth"], "absent.pth"),
        (["--search.lr=1e30", "--search.optimizer=sgd"], "iteration"),
    ],
)
def test_what_goes_wrong_in_a_run_is_one_line(
    tmp_path: Path,
    tiny_task: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["search", str(tmp_path), *TINY, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vpns: error: ")
    assert message in last


def test_debug_shows_where_an_error_comes_from(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["search", str(tmp_path), *TINY, "--method=magic"]
    assert cli.main(wrong) == 2
    assert capsys.readouterr().err.endswith(" (--debug shows where)\n")
    assert cli.main([*wrong, "--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    last = printed.splitlines()[-1]
    assert "expected method in" in last
    assert "--debug" not in last


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--densty=1"],
        ["report", "nope"],
        ["report", "nope", "neither"],
        ["bench", "nope"],
        ["bench", "--model=nope"],
        ["export", "nope"],
        ["data", "check", "nope"],
        ["data", "download", "nope", "nowhere"],
        ["sweep", "nope.yaml"],
        ["reproduce", "nope"],
        ["doctor", "--nope"],
    ],
    ids=" ".join,
)
def test_every_command_takes_debug_wherever_it_stands(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in range(len(arguments) + 1):
        assert cli.main([*arguments[:place], "--debug", *arguments[place:]]) == 2
        assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("defect", [RuntimeError, TypeError, KeyError, ZeroDivisionError, AssertionError])
def test_a_defect_of_ours_keeps_its_traceback(
    defect: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise defect("ours")

    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(defect, match="ours"):
        cli.main(["run", str(tmp_path)])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("x: can't allocate memory: y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_fit_memory_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "execute", fail)
    assert "not enough memory: " in error_of(["run", str(tmp_path)], capsys)


def test_the_bare_command_and_its_version_tell_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in (*cli.COMMANDS, "data", "doctor", "reproduce", "sweep"))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"vpns \d\S+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "told", "other"),
    [
        (
            "bench",
            ("bench RUN", "bench ARTIFACT", "bench --model NAME", "--opponents", "--quick"),
            "--search",
        ),
        ("report", ("report RUN", "report RUN RUN", "report SWEEP", "--output"), "--search"),
        ("export", ("--format", "--run-folder"), "--search"),
        ("eval", ("--search.lr",), "--output"),
    ],
)
def test_help_tells_what_a_command_takes(
    command: str, told: tuple[str, ...], other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert all(part in printed for part in (*told, "--debug"))
    assert other not in printed


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path,
    tiny_task: ModuleType,
    capsys: pytest.CaptureFixture[str],
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    with full_disk():
        assert cli.main(["search", str(tmp_path), *TINY]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vpns: error: cannot write {tmp_path}")
    assert "File too large" in last
    assert cli.main(["search", str(tmp_path)]) == 0


def test_a_run_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in error_of(["run", str(tmp_path / "file" / "run")], capsys)
    assert "cannot write" in error_of(["run", "/proc/vpns"], capsys)


def test_a_folder_gives_its_own_settings_and_refuses_others(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    assert cli.main(["pretrain", folder, *TINY]) == 0
    begun = run.load_config(tmp_path / "run")
    assert config_of(["eval", folder]) == begun
    capsys.readouterr()
    message = error_of(["pretrain", folder, "--density", "0.5"], capsys)
    assert "got others for density (take another folder)" in message
    file = tmp_path / "x.yaml"
    file.write_text("density: 0.3\n")
    # A file stands for all settings, so those it does not name are the defaults.
    assert "data.train_count, model.name" in error_of(["pretrain", folder, "--config", str(file)], capsys)


def test_two_commands_on_one_folder_are_one_too_many(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from vpns.state import lock_folder

    with lock_folder(tmp_path):
        assert "another process works in it" in error_of(["run", str(tmp_path), *TINY], capsys)


def test_ctrl_c_exits_with_130_and_the_command_to_go_on(tmp_path: Path, tiny_task: ModuleType) -> None:
    command = [sys.executable, "-m", "vpns", "search", str(tmp_path / "run")]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *TINY, "--search.epochs=100000"], env=environment, stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / "run" / "metrics.jsonl"
    while not rows.exists() or rows.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        printed.splitlines()[-1] == f"vpns: interrupted; `vpns search {tmp_path / 'run'}` goes on from here"
    )
    assert (tmp_path / "run" / "search" / "state.json").exists()


def test_a_log_file_gets_a_line_per_stage_and_no_bar(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", str(tmp_path), *TINY]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["pretrain", "search"]
    assert "val_accuracy" in lines[1]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(sys.stderr)
    progress.on_start(StageStart("search", updates=4, updates_done=1))
    progress.on_step(Step("search", 0, 1, 0.5))
    progress.on_eval(EpochMetrics("search", 1, 2, 0.5, 50.0, 75.0, 0.1, 2, 20, 1.0))
    progress.on_end(End("search", {"val_accuracy": 75.0}, 1.0))
    printed = capsys.readouterr().err
    assert "2/4" in printed
    assert "validation 75.0" in printed
