"""Does a run that is killed at any moment end as if nothing had happened?"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vpns.files import read_tensors
from vpns.metrics import MetricsLog
from vpns.run import execute
from vpns.state import load_state, save_state

KILLS = 20
FINAL = ("dense/weights", "search/masks", "search/scores", "search/prompt", "search/network", "tune/weights",
         "tune/masks", "tune/prompt", "eval/outputs")  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that are forked from one that has imported what they need, so that they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vpns.run", "torch._dynamo", "sklearn.datasets"])
    return context


def start_run(processes: ForkServerContext, tiny_task: ModuleType, folder: Path) -> ForkServerProcess:
    process = processes.Process(
        target=execute, args=(folder, tiny_task.make_config(save_every_s=0.0), "eval")
    )
    process.start()
    return process


def assert_same_run(folder: Path, other: Path) -> None:
    for name in FINAL:
        ours, theirs = (read_tensors(f / f"{name}.safetensors") for f in (folder, other))
        assert ours.keys() == theirs.keys()
        differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not differing, f"{name}: {differing}"
    rows, others = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in MetricsLog(f).rows()]
        for f in (folder, other)
    )
    assert rows == others


def test_twenty_runs_killed_at_random_moments_end_bitwise_as_one_that_was_not(
    tmp_path: Path, processes: ForkServerContext, tiny_task: ModuleType
) -> None:
    whole = tmp_path / "whole"
    start_run(processes, tiny_task, tmp_path / "warm").join()
    started_at = time.monotonic()
    process = start_run(processes, tiny_task, whole)
    process.join()
    life_s = time.monotonic() - started_at
    assert process.exitcode == 0

    def kill_and_resume(number: int) -> bool:
        """Whether a stage was training when the kill came."""
        folder, moment_s = tmp_path / str(number), life_s * random.Random(number).random()
        while True:
            victim = start_run(processes, tiny_task, folder / f"{moment_s:.6f}")
            victim.join(moment_s)
            victim.kill()
            victim.join()
            if victim.exitcode == -signal.SIGKILL:
                break
            # It was faster than the one that was timed.
            moment_s *= 0.8
        folder /= f"{moment_s:.6f}"
        was_training = any(folder.glob("*/state.json"))
        resumed = start_run(processes, tiny_task, folder)
        resumed.join()
        assert resumed.exitcode == 0
        assert_same_run(folder, whole)
        return was_training

    # One after the other: starting a process polls all others, and of two threads that poll one process one
    # alone learns its exit code.
    assert sum(map(kill_and_resume, range(KILLS))) >= 5


def test_a_state_killed_before_any_of_its_file_operations_is_the_old_one_or_the_new_one(
    tmp_path: Path, processes: ForkServerContext, tiny_task: ModuleType
) -> None:
    old, new = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}
    found = []
    for operation in range(100):
        folder = tmp_path / str(operation)
        folder.mkdir()
        save_state(folder, old, {"epoch": 1})
        process = processes.Process(
            target=tiny_task.save_and_die, args=(folder, new, {"epoch": 2}, operation)
        )
        process.start()
        process.join()
        loaded = load_state(folder)
        assert loaded is not None
        tensors, position = loaded
        assert torch.equal(tensors["x"], (old if position["epoch"] == 1 else new)["x"])
        found.append(position["epoch"])
        # What the kill left behind must not stop the next save either.
        save_state(folder, new, {"epoch": 3})
        assert len(list(folder.iterdir())) == 2
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert len(found) > 8
