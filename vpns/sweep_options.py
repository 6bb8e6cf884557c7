"""What can `vpns sweep` be told? Which grid, in which folder, and who does the runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from vpns.option_help import add_debug

# More processes than this gain little where each holds a network, and may take more memory than there is.
_MOST_WORKERS = 4


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is done.

    Args:
        workers: runs at once.
        threads: of each run; equal threads give equal bits, wherever a run is done.
        where: processes of this machine, or tasks of Ray.
        ray_address: of a cluster that was started; None starts one within the sweep.
        is_dry: print the runs and what they would cost, and do nothing.
    """

    grid: Path
    folder: Path
    workers: int
    threads: int
    where: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    is_dry: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"sweep: expected {name} >= 1, got {getattr(self, name)}")
        if self.ray_address is not None and self.where != "ray":
            raise ValueError(f"sweep: expected --on ray beside --ray-address, got --on {self.where}")


def add_worker_options(parser: ArgumentParser) -> None:
    """Options of every command that does many runs."""
    parser.add_argument("--workers", type=int, help="runs at once (default: the cores, at most 4)")
    parser.add_argument("--threads", type=int, help="of each run (default: the cores, shared out)")
    parser.add_argument("--on", type=Literal["local", "ray"], default="local", help="who does the runs")
    parser.add_argument("--ray-address", type=str, help="of a started cluster (default: one of its own)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of their cost")
    add_debug(parser)


def parse_sweep(options: Sequence[str]) -> SweepOptions:
    """What they say; ArgumentError or ValueError where they are wrong."""
    parser = ArgumentParser(
        prog="vpns sweep",
        description="Do every run of a grid of settings; the same command again goes on where it stopped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=str, help="YAML file: settings of all runs, and a grid of choices")
    parser.add_argument("--folder", type=str, help="of the sweep (default: runs/<name of the grid's file>)")
    add_worker_options(parser)
    given = parser.parse_args(list(options))
    grid = Path(given.grid)
    if not grid.is_file():
        raise ValueError(f"sweep: expected a YAML file, got {grid}")
    workers, threads = share_cores(given.workers, given.threads)
    return SweepOptions(
        grid=grid,
        folder=Path(given.folder or Path("runs") / grid.stem),
        workers=workers,
        threads=threads,
        where=given.on,
        ray_address=given.ray_address,
        is_dry=given.dry_run,
    )


def share_cores(workers: int | None, threads: int | None) -> tuple[int, int]:
    """Workers and the threads of each: together no more than there are cores, but where both are given."""
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = max(1, min(_MOST_WORKERS, cores // (threads or 1)))
    return workers, threads or max(1, cores // workers)
