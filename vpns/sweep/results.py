"""What came out of a sweep? One row per run, from the records of its finished stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vpns.report.outcome import Row, describe_run
from vpns.sweep.grid import Grid


def collect_rows(grid: Grid, folder: Path, errors: Mapping[str, str]) -> list[Row]:
    """The runs in the order of the grid; what has not been found out is None.

    Args:
        errors: of runs that did not end well, by name.
    """
    return [
        {"run": run.name, **run.choices}
        | describe_run(folder / "runs" / run.name)
        | {"error": errors.get(run.name)}
        for run in grid.runs
    ]
