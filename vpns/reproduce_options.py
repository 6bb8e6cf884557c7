"""What can `vpns reproduce` be told? Which experiment, with how many seeds, on whose data, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import ArgumentParser

from vpns.sweep_options import SweepOptions, add_worker_options, share_cores

ExperimentName = Literal["arms", "exp1", "exp2", "exp3"]


@dataclass(frozen=True)
class ReproduceOptions:
    """One experiment.

    Args:
        seeds: how many; None for as many as the experiment has by itself.
        config: YAML of a run's settings, such as a preset's with the place of the data; None for the embedded
            task.
        json: where the results go beside the folder.
    """

    experiment: ExperimentName
    sweep: SweepOptions
    seeds: int | None = None
    config: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 2:
            raise ValueError(f"reproduce: expected seeds >= 2, got {self.seeds} (one cannot be compared)")


def parse_reproduce(options: Sequence[str]) -> ReproduceOptions:
    """What they say; ArgumentError or ValueError where they are wrong."""
    parser = ArgumentParser(
        prog="vpns reproduce",
        description="Do a whole experiment, with its statistics; the same command again goes on.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    told = "arms: is it the prompt? exp1: HYDRA; exp2: width of the frame; exp3: channels"
    parser.add_argument("experiment", type=str, help=told)
    parser.add_argument("--folder", type=str, help="of its runs (default: runs/<experiment>)")
    parser.add_argument("--seeds", type=int, help="how many (default: the experiment's own)")
    parser.add_argument("--config", type=str, help="YAML of a run, such as a preset (default: embedded task)")
    parser.add_argument("--json", type=str, help="where the results go as well")
    add_worker_options(parser)
    given = parser.parse_args(list(options))
    if given.experiment not in get_args(ExperimentName):
        raise ValueError(f"reproduce: expected one of {get_args(ExperimentName)}, got {given.experiment!r}")
    if given.config is not None and not Path(given.config).is_file():
        raise ValueError(f"reproduce: expected a YAML file for --config, got {given.config}")
    workers, threads = share_cores(given.workers, given.threads)
    sweep = SweepOptions(
        grid=Path(given.config or "embedded"),
        folder=Path(given.folder or Path("runs") / given.experiment),
        workers=workers,
        threads=threads,
        where=given.on,
        ray_address=given.ray_address,
        is_dry=given.dry_run,
    )
    return ReproduceOptions(
        experiment=given.experiment,
        sweep=sweep,
        seeds=given.seeds,
        config=None if given.config is None else Path(given.config),
        json=None if given.json is None else Path(given.json),
    )
