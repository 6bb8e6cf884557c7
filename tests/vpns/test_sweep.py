"""Do many runs end as each would alone, whoever does them, whatever is killed, and whichever fail?"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vpns import cli
from vpns.files import read_json, read_tensors
from vpns.run import execute
from vpns.sweep import Grid, Swept, build_grid, estimate_cost, run_sweep
from vpns.sweep.job import Job, Outcome, borrow_stages
from vpns.sweep.schedule import schedule
from vpns.sweep_options import SweepOptions, parse_sweep, share_cores

TINY: dict[str, Any] = {
    "data": {"train_count": 60},
    "model": {"name": "tiny_task:build", "source_classes": 12},
    "prompt": {"canvas": 16, "frame": 2},
    "pretrain.epochs": 0,
    "search": {"epochs": 2, "batch_size": 20, "lr": 1e-2},
    "tune": {"epochs": 2, "batch_size": 20},
    "pattern": "unstructured",
    "density": 0.3,
}
OUTPUTS = ("dense/weights", "search/masks", "search/prompt", "tune/weights", "tune/prompt", "eval/outputs")


def make_grid(until: str = "eval", **axes: Any) -> Grid:
    return build_grid({"settings": TINY, "grid": axes or {"method": ["vpns", "omp"]}, "until": until})


def make_options(folder: Path, **changes: Any) -> SweepOptions:
    return replace(SweepOptions(Path("grid.yaml"), folder, workers=2, threads=1), **changes)


def assert_same_bits(folder: Path, other: Path) -> None:
    for name in OUTPUTS:
        ours, theirs = (read_tensors(f / f"{name}.safetensors") for f in (folder, other))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Swept, str]:
    """A sweep of two methods, one of which cannot be: its folder, outcome, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        folder, said = tmp_path_factory.mktemp("swept") / "sweep", io.StringIO()
        grid = make_grid(
            arm={"vpns": {}, "omp": {"method": "omp"}, "broken": {"data": {"name": "folder", "root": "none"}}}
        )
        return folder, run_sweep(grid, make_options(folder), said), said.getvalue()


def test_a_swept_run_is_the_run_alone_to_the_last_bit_and_shares_its_dense_reference(
    swept: tuple[Path, Swept, str], tmp_path: Path, tiny_task: ModuleType
) -> None:
    (folder, _, _), grid = swept, make_grid()
    execute(tmp_path / "alone", replace(grid.runs[0].config, threads=1), "eval")
    assert_same_bits(folder / "runs" / "vpns", tmp_path / "alone")
    rows = [
        (folder / "runs" / name / "metrics.csv").read_text().splitlines()[1].split(",")[:2]
        for name in ("vpns", "omp")
    ]
    assert rows == [["dense", "1"]] * 2
    shared = {
        (folder / "runs" / name / "dense" / "weights.safetensors").stat().st_ino for name in ("vpns", "omp")
    }
    assert len(shared) == 1
    assert len(list((folder / "dense").glob("digits*"))) == 1


def test_what_fails_is_kept_shown_and_does_not_stop_the_others(swept: tuple[Path, Swept, str]) -> None:
    folder, outcome, said = swept
    (reference,) = [name for name in outcome.errors if name.startswith("dense-folder")]
    assert set(outcome.errors) == {"broken", reference}
    assert outcome.errors["broken"] == f"{reference} failed"
    lines = said.splitlines()
    assert len(lines) == 5
    assert sum("FAILED" in line for line in lines) == 2
    assert "Traceback" in (folder / "logs" / f"{reference}.log").read_text()
    with (folder / "results.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert (
        float(rows["vpns"]["accuracy"])
        == read_json(folder / "runs/vpns/eval/stage.json")["result"]["accuracy"]
    )
    assert rows["broken"]["accuracy"] == ""
    assert rows["broken"]["error"] == outcome.errors["broken"]
    assert rows["vpns"]["error"] == ""


def test_the_same_sweep_again_does_only_what_failed_and_another_is_refused(
    swept: tuple[Path, Swept, str], tmp_path: Path, tiny_task: ModuleType
) -> None:
    folder, _, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("stage.json")}
    arms = {"vpns": {}, "omp": {"method": "omp"}, "broken": {"data": {"name": "folder", "root": "none"}}}
    said = io.StringIO()
    again = run_sweep(make_grid(arm=arms), make_options(folder), said)
    assert said.getvalue().startswith("3 of 5 were finished before")
    assert set(again.errors) == {"broken", *(name for name in again.errors if name.startswith("dense-"))}
    for grid, words in (
        (make_grid(method=["vpns"]), "expected the sweep in"),
        (make_grid(arm=arms | {"vpns": {"search.lr": 0.5}}), r"got others for search\.lr"),
        (make_grid("report", arm=arms), "until=eval"),
    ):
        with pytest.raises(ValueError, match=words):
            run_sweep(grid, make_options(folder), said)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, tiny_task: ModuleType) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"expected an empty folder .* with letter\.txt"):
        run_sweep(make_grid(), make_options(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(ValueError, match=r"run vpnz: .*method"):
        run_sweep(make_grid(method=["omp", "vpnz"]), make_options(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def start(folder: Path) -> subprocess.Popen[str]:
    """`vpns sweep` of two seeds in a process of its own, saving after every iteration."""
    grid = {"settings": TINY | {"save_every_s": 0.0}, "grid": {"seed": [7, 8]}, "until": "eval"}
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(grid))
    command = [sys.executable, "-m", "vpns", "sweep", str(path), "--folder", str(folder)]
    paths = os.pathsep.join([str(Path(cli.__file__).parents[1]), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    options = ["--workers", "2", "--threads", "1"]
    return subprocess.Popen(
        command + options, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )


def _heed_interrupts() -> None:
    """Of tests that a shell started in the background, as some do, interrupts are ignored by all below."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_sweep_killed_at_any_moment_goes_on_and_ends_bitwise_the_same(
    swept: tuple[Path, Swept, str], tmp_path: Path
) -> None:
    folder, moments = tmp_path / "killed", random.Random(0)
    for how, where, code in ((signal.SIGKILL, "dense", -signal.SIGKILL), (signal.SIGINT, "runs", 130)):
        before = tmp_path / f"before_{where}"
        if folder.exists():
            shutil.copytree(folder, before)
        for attempt in range(8):
            process = start(folder)
            # Not before there is something to lose.
            while process.poll() is None and not list(folder.glob(f"{where}/*/*/state.json")):
                time.sleep(0.001)
            time.sleep(0.1 * moments.random() / 2**attempt)
            process.send_signal(how)
            _, said = process.communicate()
            if process.returncode != 0:
                break
            # It was faster than the signal: once more from where it was, with less to wait for.
            shutil.rmtree(folder)
            if before.exists():
                shutil.copytree(before, folder)
        assert process.returncode == code, said
        assert process.returncode != 130 or "goes on from here" in said
    process = start(folder)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "of 4 were finished before" in said
    assert_same_bits(folder / "runs" / "seed7", swept[0] / "runs" / "vpns")


def test_runs_that_were_tested_are_timed_reported_and_compared(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(Path(cli.__file__).parents[1]), str(Path(__file__).parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    Path("grid.yaml").write_text(json.dumps({"settings": TINY, "grid": {"method": ["omp"]}}))
    assert cli.main(["sweep", "grid.yaml", "--threads=1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "runs/grid/report/report.html"
    assert "x as fast as dense" in printed.err
    with Path("runs/grid/results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["sparse_ms"]) > 0
    assert Path("runs/grid/runs/omp/report/report.html").is_file()
    assert "(../runs/omp/report/report.html)" in Path("runs/grid/report/report.md").read_text()


def test_runs_that_are_not_to_be_timed_end_with_their_test(tmp_path: Path, tiny_task: ModuleType) -> None:
    grid = make_grid("report", method=["omp", "random"])
    outcome = run_sweep(grid, make_options(tmp_path), io.StringIO(), is_timed=lambda c: c.method == "omp")
    assert not outcome.errors
    omp, random_masks = outcome.rows
    assert (omp["sparse_ms"] > 0, random_masks["sparse_ms"]) == (True, None)
    assert random_masks["accuracy"] > 0
    assert not (tmp_path / "runs" / "random" / "export").exists()


def test_ray_gives_the_bits_of_local_processes(
    swept: tuple[Path, Swept, str], tmp_path: Path, tiny_task: ModuleType
) -> None:
    grid = make_grid(arm={"vpns": {}})
    outcome = run_sweep(grid, make_options(tmp_path / "ray", where="ray", workers=1))
    assert not outcome.errors
    assert_same_bits(tmp_path / "ray" / "runs" / "vpns", swept[0] / "runs" / "vpns")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster as `ray start --head` starts it, of its own: no other is stopped with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--port", address.rpartition(":")[2], "--num-cpus=2"]
    log = tmp_path / "cluster.log"
    with log.open("w") as file:
        started = subprocess.Popen(
            [ray, "start", *options, "--include-dashboard=false", "--disable-usage-stats"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        started.terminate()
        started.wait(60)


@pytest.mark.long
def test_a_cluster_that_was_started_gives_them_too(
    swept: tuple[Path, Swept, str], cluster: str, tmp_path: Path, tiny_task: ModuleType
) -> None:
    options = make_options(tmp_path / "ray", where="ray", ray_address=cluster)
    outcome = run_sweep(make_grid(arm={"vpns": {}, "random": {"method": "random"}}), options)
    assert not outcome.errors
    assert_same_bits(tmp_path / "ray" / "runs" / "vpns", swept[0] / "runs" / "vpns")
    assert (tmp_path / "ray" / "runs" / "random" / "eval").is_dir()


def test_a_ray_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_task: ModuleType
) -> None:
    with pytest.raises(ValueError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, got .*ray start --head"):
        run_sweep(make_grid(), make_options(tmp_path / "a", where="ray", ray_address="127.0.0.1:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"expected Ray .*\.\[ray\]"):
        run_sweep(make_grid(), make_options(tmp_path / "b", where="ray"))
    assert not list(tmp_path.glob("*/runs"))


def test_a_dry_run_names_every_run_with_its_cost_and_does_nothing(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"settings": TINY | {"search.epochs": 300}, "grid": {"method": ["vpns", "omp"], "seed": [1, 2]}}
    Path("grid.yaml").write_text(json.dumps(content))
    threads = torch.get_num_threads()
    assert cli.main(["sweep", "grid.yaml", "--dry-run", "--threads=1"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("vpns-seed1", "omp-seed2", "one update, measured as"))
    assert "4 runs and 2 dense references" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]
    assert torch.get_num_threads() == threads
    estimate = estimate_cost(build_grid(content), tmp_path / "x", threads=1)
    assert estimate.seconds["vpns-seed1"] > estimate.seconds["omp-seed1"] > 0
    assert estimate.wall_seconds(2) == pytest.approx(sum(estimate.seconds.values()) / 2)


class FakeExecutor:
    """Ends jobs last begun first."""

    def __init__(self, room: int, failing: set[str]) -> None:
        self.room, self.failing, self.running, self.most = room, failing, list[Job](), 0

    def has_room(self) -> bool:
        return len(self.running) < self.room

    def start(self, job: Job) -> None:
        self.running.append(job)
        self.most = max(self.most, len(self.running))

    def wait(self) -> Outcome:
        job = self.running.pop()
        return Outcome(job.name, 1.0, "broke" if job.name in self.failing else None)

    def close(self) -> list[Outcome]:
        return []


def test_jobs_wait_for_what_they_need_fail_with_it_and_keep_to_the_room() -> None:
    grid = make_grid()

    def job(name: str, needs: str | None = None) -> Job:
        return Job(name, Path(name), grid.runs[0].config, "eval", Path("log"), None, needs)

    jobs = [job("a"), job("b"), job("c"), job("a1", "a"), job("a2", "a"), job("b1", "b"), job("d1", "d")]
    executor = FakeExecutor(2, {"b"})
    ended = [(job.name, outcome.error) for job, outcome in schedule(jobs, executor, {"d"})]
    assert sorted(name for name, _ in ended) == sorted(job.name for job in jobs)
    assert {name: error for name, error in ended if error} == {"b": "broke", "b1": "b failed"}
    names = [name for name, _ in ended]
    assert names.index("a") < min(names.index("a1"), names.index("a2"))
    assert executor.most == 2
    with pytest.raises(ValueError, match="expected a job that x names"):
        list(schedule([job("y", "x")], FakeExecutor(1, set())))


def test_stages_are_borrowed_whole_after_a_kill_in_their_midst(
    swept: tuple[Path, Swept, str], tmp_path: Path
) -> None:
    (lender,) = (swept[0] / "dense").glob("digits*")
    borrow_stages(lender, tmp_path / "run")
    (tmp_path / "run" / "dense" / "stage.json").unlink()
    borrow_stages(lender, tmp_path / "run")
    names = {path.relative_to(lender) for path in lender.rglob("*") if path.is_file()}
    missing = {path.as_posix() for path in names if not (tmp_path / "run" / path).exists()}
    assert missing == {"job.json", "run.json", "run.lock", "metrics.csv"}


def test_cores_are_shared_out() -> None:
    cores = len(os.sched_getaffinity(0))
    workers, threads = share_cores(None, None)
    assert workers * threads <= cores
    assert share_cores(3, 5) == (3, 5)
    assert share_cores(cores, None) == (cores, 1)
    with pytest.raises(ValueError, match="workers >= 1"):
        SweepOptions(Path("x"), Path("y"), workers=0, threads=1)
    with pytest.raises(ValueError, match="expected a YAML file, got none"):
        parse_sweep(["none"])
