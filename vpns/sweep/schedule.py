"""In what order do jobs run? As they stand, as many at once as there is room, each after what it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from vpns.sweep.job import Executor, Job, Outcome


def schedule(
    jobs: Sequence[Job], executor: Executor, finished: Collection[str] = ()
) -> Iterator[tuple[Job, Outcome]]:
    """Every job and how it ended, as they end; one whose need has failed fails without being begun.

    Args:
        finished: names of jobs that need not be done again.
    """
    waiting, running = list(jobs), dict[str, Job]()
    well, failed = set(finished), set[str]()
    while waiting or running:
        for job in list(waiting):
            if job.needs in failed:
                waiting.remove(job)
                failed.add(job.name)
                yield job, Outcome(job.name, 0.0, f"{job.needs} failed")
            elif (job.needs is None or job.needs in well) and executor.has_room():
                waiting.remove(job)
                running[job.name] = job
                executor.start(job)
        if not running:
            if waiting and not any(job.needs in failed for job in waiting):
                raise ValueError(f"schedule: expected a job that {waiting[0].needs} names, got none")
            continue
        outcome = executor.wait()
        (well if outcome.error is None else failed).add(outcome.name)
        yield running.pop(outcome.name), outcome
