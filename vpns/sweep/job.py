"""What does one process of a sweep do? A run, or the dense reference that several runs share; once, alone."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vpns.complaint import describe_error, is_user_error
from vpns.config import RunConfig
from vpns.files import make_folder, read_json, write_json
from vpns.state import SCHEMA_VERSION
from vpns_kernels.memory import peak_resident_bytes

# What runs of equal settings up to here have in common.
SHARED_STAGES = ("pretrain", "dense")


@dataclass(frozen=True)
class Job:
    """What to do in a folder of its own.

    Args:
        config: with the number of threads; no job takes another.
        until: the last stage.
        log: where everything that the job prints goes.
        lender: the folder of a finished dense reference to begin with.
        needs: the name of the job that must have ended well before.
    """

    name: str
    folder: Path
    config: RunConfig
    until: str
    log: Path
    lender: Path | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        error: why it did not end well, in one line.
    """

    name: str
    seconds: float
    error: str | None = None
    is_interrupted: bool = False


class Executor(Protocol):
    """Who runs jobs, several at once, each in a process of its own."""

    def has_room(self) -> bool:
        """Whether another job can begin."""

    def start(self, job: Job) -> None:
        """Begin a job."""

    def wait(self) -> Outcome:
        """The outcome of the job that ends next; waits for it."""

    def close(self) -> Sequence[Outcome]:
        """Ask what still runs to save its state and stop, wait for it, and give back what was taken."""


def is_finished(job: Job) -> bool:
    """Whether the job's last stage has finished, in this sweep or before."""
    return (job.folder / job.until / "stage.json").is_file()


def do_job(job: Job) -> Outcome:
    """Do what is missing of a job; what a user can mend is its outcome, a defect of ours is raised."""
    from vpns.observe import Progress
    from vpns.run import execute

    started_at, begun_bytes = time.monotonic(), peak_resident_bytes()
    make_folder(job.log.parent)
    with job.log.open("a") as log:
        try:
            if job.lender is not None:
                borrow_stages(job.lender, job.folder)
            execute(job.folder, job.config, job.until, [Progress(log)])
            _note_peak(job.folder / "job.json", peak_resident_bytes() - begun_bytes)
        except Exception as error:
            if not is_user_error(error):
                raise
            traceback.print_exc(file=log)
            return Outcome(job.name, time.monotonic() - started_at, describe_error(error))
        except KeyboardInterrupt:
            return Outcome(job.name, time.monotonic() - started_at, "interrupted", is_interrupted=True)
    return Outcome(job.name, time.monotonic() - started_at)


def _note_peak(path: Path, peak_bytes: int) -> None:
    """The most of all processes that worked on a job: one that went on with a run may have needed less."""
    before = read_json(path)["peak_bytes"] if path.exists() else 0
    write_json(path, {"schema_version": SCHEMA_VERSION, "peak_bytes": max(before, peak_bytes)})


def borrow_stages(lender: Path, folder: Path) -> None:
    """Begin a run with the finished stages of another; their files are the same ones, not copies.

    Files of a run are only ever replaced whole, so that neither changes the other's. A kill at any point
    leaves what the same call completes.
    """
    make_folder(folder)
    if (folder / "run.json").exists():
        return
    shutil.copyfile(lender / "metrics.jsonl", folder / "metrics.jsonl")
    for stage in SHARED_STAGES:
        for path in sorted((lender / stage).rglob("*"), key=lambda path: path.name == "stage.json"):
            target = folder / stage / path.relative_to(lender / stage)
            if path.is_file() and not target.exists():
                make_folder(target.parent)
                _link(path, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without links: a copy, which appears whole or not at all.
        tmp = target.with_name(target.name + ".tmp")
        shutil.copyfile(source, tmp)
        tmp.rename(target)
