"""How do jobs run on a Ray cluster? As tasks that take as many CPUs as a job has threads (extra `[ray]`)."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from vpns.sweep.job import Job, Outcome, do_job

_CONNECT_SECONDS = 5.0


class RayExecutor:
    """Tasks of Ray, each in a fresh process; folders must be the same for all machines of the cluster.

    Args:
        workers: how many jobs at once.
        threads: of each.
        address: of a cluster that was started, as `ray.init` takes it; None starts one in this process.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, workers: int, threads: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                f"sweep: expected Ray for --on ray, got {error} (pip install -c constraints.txt -e '.[ray]')"
            ) from error
        self._ray, self._workers = ray, workers
        self._running: dict[Any, tuple[Job, float]] = {}
        if address is None:
            # "local": never the cluster that somebody else has started on this machine.
            options: dict[str, Any] = {"address": "local", "num_cpus": workers * threads}
            options["include_dashboard"] = False
        else:
            _expect_listener(address)
            options = {"address": address}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address or "this machine", error) from error
        # One call per process: nothing of a job is left for the next, as with local processes.
        self._do = ray.remote(
            num_cpus=threads,
            max_calls=1,
            max_retries=0,
            runtime_env={
                "env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(_own_paths())}
            },
        )(do_job)

    def has_room(self) -> bool:
        return len(self._running) < self._workers

    def start(self, job: Job) -> None:
        self._running[self._do.remote(job)] = (job, time.monotonic())

    def wait(self) -> Outcome:
        (reference, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        job, started_at = self._running.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            is_interrupted = isinstance(error, self._ray.exceptions.TaskCancelledError)
            what = str(error).strip().splitlines()[-1]
            return Outcome(job.name, time.monotonic() - started_at, f"{what} (see {job.log})", is_interrupted)
        return outcome

    def close(self) -> Sequence[Outcome]:
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        outcomes = [self.wait() for _ in list(self._running)]
        self._ray.shutdown()
        return outcomes


def _expect_listener(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ValueError:
    hint = "ray start --head starts one; RAY_AUTH_TOKEN must be the cluster's where it asks for one"
    return ValueError(f"sweep: expected a Ray cluster at {address}, got {error} ({hint})")


def _own_paths() -> list[str]:
    """Where this process finds modules that are not installed, such as a user's own network."""
    installed = (sys.prefix, sys.base_prefix)
    return [os.getcwd(), *(path for path in sys.path if path and not path.startswith(installed))]
