"""How does a sweep go? Dense references and runs side by side, then every run timed alone; failures stay."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from vpns.config import RunConfig
from vpns.files import write_json
from vpns.report.outcome import Row, describe_run
from vpns.report.tables import write_table
from vpns.state import SCHEMA_VERSION, lock_folder
from vpns.sweep.grid import Grid
from vpns.sweep.job import Executor, Job, Outcome, is_finished
from vpns.sweep.local import LocalExecutor
from vpns.sweep.on_ray import RayExecutor
from vpns.sweep.plan import open_sweep, plan_jobs
from vpns.sweep.results import collect_rows
from vpns.sweep.schedule import schedule
from vpns.sweep_options import SweepOptions


@dataclass(frozen=True)
class Swept:
    """What came of it.

    Args:
        rows: one per run, as results.csv holds them.
        errors: of what did not end well, by name.
    """

    rows: list[Row]
    errors: dict[str, str]


def run_sweep(
    grid: Grid,
    options: SweepOptions,
    stream: TextIO | None = None,
    is_timed: Callable[[RunConfig], bool] = lambda config: True,
) -> Swept:
    """Do what is missing of a sweep; writes results.csv and results.json into its folder.

    Args:
        is_timed: of a grid that goes on to the report, the runs that do; the others end with their test.

    Raises:
        ValueError: settings that cannot be, another sweep in the folder, a Ray that is not there.
        KeyboardInterrupt: Ctrl-C, after what ran has saved its state.
    """
    folder = options.folder
    threads = open_sweep(folder, grid, options.threads)
    jobs, errors = plan_jobs(grid, folder, threads), dict[str, str]()
    with lock_folder(folder):
        progress = _Progress(jobs, sys.stderr if stream is None else stream)
        try:
            if any(not is_finished(job) for job in jobs):
                _do(jobs, _make_executor(options, threads), progress, errors)
            if grid.until == "report":
                # Times are taken alone, and all of them on this machine, so that they compare.
                tested = [job for job in jobs if job.lender and is_finished(job)]
                timed = [
                    replace(job, until="report", lender=None, needs=None)
                    for job in tested
                    if is_timed(job.config)
                ]
                timing = _Progress(timed, progress.stream)
                _do(timed, LocalExecutor(1, threads), timing, errors)
        finally:
            rows = collect_rows(grid, folder, errors)
            write_json(folder / "results.json", {"schema_version": SCHEMA_VERSION, "runs": rows})
            write_table(folder / "results.csv", rows)
    return Swept(rows, errors)


def _make_executor(options: SweepOptions, threads: int) -> Executor:
    if options.where == "ray":
        return RayExecutor(options.workers, threads, options.ray_address)
    return LocalExecutor(options.workers, threads)


def _do(jobs: Sequence[Job], executor: Executor, progress: _Progress, errors: dict[str, str]) -> None:
    missing = [job for job in jobs if not is_finished(job)]
    try:
        for job, outcome in schedule(missing, executor, {job.name for job in jobs if is_finished(job)}):
            if outcome.is_interrupted:
                raise KeyboardInterrupt
            if outcome.error is not None:
                errors[job.name] = outcome.error
            progress.tell(job, outcome)
    finally:
        executor.close()


class _Progress:
    """One line per job that ends, and how long what is left may take."""

    def __init__(self, jobs: Sequence[Job], stream: TextIO) -> None:
        self.stream = stream
        self._jobs, self._started_at, self._ended = len(jobs), time.monotonic(), 0
        self._before = sum(is_finished(job) for job in jobs)
        if self._before:
            print(f"{self._before} of {self._jobs} were finished before", file=stream, flush=True)

    def tell(self, job: Job, outcome: Outcome) -> None:
        self._ended += 1
        done = self._before + self._ended
        place = f"[{done:{len(str(self._jobs))}}/{self._jobs}]"
        if outcome.error is not None:
            line = f"{place} {job.name}: FAILED: {outcome.error}"
        else:
            left = (time.monotonic() - self._started_at) / self._ended * (self._jobs - done)
            told = [_tell_result(job), f"{outcome.seconds:.0f} s"]
            told += [f"{_tell_duration(left)} left"] if left else []
            line = f"{place} {job.name}: " + ", ".join(part for part in told if part)
        print(line, file=self.stream, flush=True)


def _tell_result(job: Job) -> str:
    found = describe_run(job.folder)
    if job.until == "report":
        return f"{found['sparse_ms']:.3g} ms, {found['speedup']:.2f}x as fast as dense"
    if job.until == "eval":
        return f"accuracy {found['accuracy']:.1f} (dense {found['dense_accuracy']:.1f})"
    return ""


def _tell_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
