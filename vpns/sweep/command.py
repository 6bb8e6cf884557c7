"""What does `vpns sweep` print, and what is its exit code?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vpns.complaint import EXIT_INTERRUPTED
from vpns.report.outcome import Row
from vpns.report.several import compare_folders
from vpns.sweep.estimate import estimate_cost
from vpns.sweep.grid import Grid
from vpns.sweep.sweep import Swept, run_sweep
from vpns.sweep_options import SweepOptions

EXIT_FAILED_RUNS = 1
_COLUMNS = ("accuracy", "dense_accuracy", "weight_density", "train_seconds", "sparse_ms", "speedup")


def do_sweep(grid: Grid, options: SweepOptions, again: str) -> int:
    """Sweep, or say what it would cost.

    Args:
        again: the command that goes on with it.

    Returns:
        0, 1 where runs failed, 130 after Ctrl-C.
    """
    try:
        if options.is_dry:
            print(tell_cost(grid, options))
            return 0
        swept = run_sweep(grid, options)
    except KeyboardInterrupt:
        print(f"vpns: interrupted; `{again}` goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(to_text(swept.rows))
    if any(row["accuracy"] is not None for row in swept.rows):
        print(compare_folders([options.folder], options.folder / "report"))
    return tell_failures(swept, options.folder)


def tell_failures(swept: Swept, folder: Path) -> int:
    """Name what failed, and give the exit code."""
    for name, error in swept.errors.items():
        print(f"vpns: {name} failed: {error}", file=sys.stderr)
    if swept.errors:
        hint = f"their words are in {folder / 'logs'}; the same command tries them again"
        print(f"vpns: {len(swept.errors)} failed; {hint}", file=sys.stderr)
    return EXIT_FAILED_RUNS if swept.errors else 0


def to_text(rows: Sequence[Row]) -> str:
    """A line per run with what was found; a dash where nothing was."""
    width = max(len("run"), *(len(row["run"]) for row in rows))
    head = f"{'run':{width}}" + "".join(f"  {name:>14}" for name in _COLUMNS)
    lines = [
        f"{row['run']:{width}}"
        + "".join(f"  {'-' if row[key] is None else f'{row[key]:.4g}':>14}" for key in _COLUMNS)
        for row in rows
    ]
    return "\n".join([head, *lines])


def tell_cost(grid: Grid, options: SweepOptions) -> str:
    """Every job with its seconds, what was measured, and the whole."""
    estimate = estimate_cost(grid, options.folder, options.threads)
    lines = [f"{seconds:8.0f} s  {name}" for name, seconds in estimate.seconds.items()]
    for name, stages in estimate.measured.items():
        told = ", ".join(f"{stage} {ms:.3g} ms" for stage, ms in stages.items())
        lines.append(f"one update, measured as {name}: {told}")
    wall = estimate.wall_seconds(options.workers) / 60
    timing = "; timing every run comes after that" if grid.until == "report" else ""
    lines.append(
        f"{len(grid.runs)} runs and {len(estimate.seconds) - len(grid.runs)} dense references: about "
        f"{wall:.1f} min with {options.workers} at once, {options.threads} threads each{timing}"
    )
    return "\n".join(lines)
