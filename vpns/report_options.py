"""What can `vpns report` be told of several runs? Which, and where the comparison goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from vpns.option_help import add_debug, asks_help

_USAGE = """vpns report RUN [--dry-run]
       vpns report RUN RUN ... [--output FOLDER]
       vpns report SWEEP [--output FOLDER]"""


@dataclass(frozen=True)
class CompareOptions:
    """Runs, or sweeps with all their runs, and the folder of the comparison."""

    folders: tuple[Path, ...]
    output: Path


def find_comparison(arguments: Sequence[str]) -> list[str] | None:
    """The options of `vpns report RUN RUN...` or `vpns report SWEEP`; None for the report of one run.

    Where help is asked for, it is that of both.
    """
    if list(arguments[:1]) != ["report"]:
        return None
    options = list(arguments[1:])
    if asks_help(options):
        return options
    # By argparse itself, which tells apart what it does not know: settings of one run.
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("folders", nargs="*")
    ahead.add_argument("--output")
    ahead.add_argument("--debug", action="store_true")
    given, _ = ahead.parse_known_args(options)
    folders = given.folders
    is_sweep = len(folders) == 1 and (Path(folders[0]) / "sweep.json").is_file()
    return options if len(folders) > 1 or is_sweep else None


def parse_comparison(options: Sequence[str]) -> CompareOptions:
    """What they say; a sweep alone keeps its comparison."""
    parser = ArgumentParser(
        prog="vpns report",
        usage=_USAGE,
        description="Write the report of a run, or one that compares several runs.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=str, help="runs, or sweeps with all their runs")
    parser.add_argument("--output", type=str, help="folder of the comparison (default: comparison)")
    add_debug(parser)
    given = parser.parse_args(list(options))
    folders = tuple(dict.fromkeys(map(Path, given.folders)))
    own = folders[0] / "report" if len(folders) == 1 else Path("comparison")
    return CompareOptions(folders, Path(given.output) if given.output else own)
