"""How do jobs run on this machine? Each in a process forked from one that has imported what all need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from vpns.files import make_folder
from vpns.sweep.job import Job, Outcome, do_job

# Imported once for all jobs: seconds of each otherwise. Nothing of it starts threads or a GPU.
_PRELOADED = ("vpns.run", "vpns.deploy", "vpns.report", "torch._dynamo", "sklearn.datasets")


@dataclass(frozen=True, eq=False)
class _Running:
    job: Job
    process: BaseProcess
    answer: Connection
    started_at: float


class LocalExecutor:
    """Processes on this machine.

    Args:
        workers: how many jobs at once.
        threads: of each; set before anything of the job is imported, since OpenMP reads it once.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self._workers, self._threads = workers, threads
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        self._running: list[_Running] = []

    def has_room(self) -> bool:
        return len(self._running) < self._workers

    def start(self, job: Job) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(job, theirs), name=job.name)
        with _environment(OMP_NUM_THREADS=str(self._threads)):
            process.start()
        theirs.close()
        self._running.append(_Running(job, process, ours, time.monotonic()))

    def wait(self) -> Outcome:
        ended = wait([running.process.sentinel for running in self._running])
        done = next(running for running in self._running if running.process.sentinel in ended)
        self._running.remove(done)
        return _outcome_of(done)

    def close(self) -> Sequence[Outcome]:
        for running in self._running:
            if running.process.pid is not None and running.process.is_alive():
                os.kill(running.process.pid, signal.SIGINT)
        return [self.wait() for _ in list(self._running)]


def _outcome_of(done: _Running) -> Outcome:
    """What the process said, or how it died."""
    done.process.join()
    with done.answer as answer:
        try:
            if answer.poll():
                outcome: Outcome = answer.recv()
                return outcome
        except EOFError:
            pass
    code, seconds = done.process.exitcode or 0, time.monotonic() - done.started_at
    is_interrupted = code == -signal.SIGINT
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Outcome(done.job.name, seconds, f"{how} (see {done.job.log})", is_interrupted)


def _work(job: Job, answer: Connection) -> None:
    """The process's whole life."""
    # Ctrl-C in a terminal reaches the sweep alone, which passes it on once: a second would not let it save.
    os.setpgrp()
    threading.Thread(target=_die_with_the_sweep, daemon=True).start()
    make_folder(job.log.parent)
    with job.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    answer.send(do_job(job))


def _die_with_the_sweep() -> None:
    """A run that outlived its sweep would hold its folder against the next; its last saved state stays."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
