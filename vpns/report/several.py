"""Which runs are meant by folders of runs and of sweeps? Those that have been tested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpns.files import read_json
from vpns.report.arms import Run, read_runs
from vpns.report.compare import write_comparison
from vpns.report.outcome import read_results
from vpns.state import SCHEMA_VERSION


def compare_folders(folders: Sequence[Path], output: Path) -> Path:
    """Write the comparison of runs and of the runs of sweeps; returns its page.

    Raises:
        FileNotFoundError: naming a folder that holds no tested run.
    """
    if len(folders) == 1 and _is_sweep(folders[0]):
        runs = read_sweep(folders[0])
    else:
        runs = read_runs([run for folder in folders for run in _expand(folder)])
    if not runs:
        raise FileNotFoundError(f"report: expected tested runs, got none in {folders[0]}")
    return write_comparison(runs, output, f"{len(runs)} runs compared")


def read_sweep(folder: Path) -> list[Run]:
    """The tested runs of a sweep, with the choices of its grid."""
    content = read_json(folder / "sweep.json")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"report: expected a sweep of schema_version {SCHEMA_VERSION} in {folder}/sweep.json"
        )
    planned = content["runs"]
    choices = {folder / "runs" / name: dict(run["choices"]) for name, run in planned.items()}
    tested = [path for path in choices if "eval" in read_results(path)]
    return read_runs(tested, choices)


def _expand(folder: Path) -> list[Path]:
    return [run.folder for run in read_sweep(folder)] if _is_sweep(folder) else [folder]


def _is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()
