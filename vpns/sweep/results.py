"""What came out of a sweep? One row per run, from the records of its finished stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpns.files import read_json
from vpns.sweep.grid import Grid
from vpns.sweep.job import read_results

Row = dict[str, Any]


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


def describe_run(folder: Path) -> Row:
    """A run's outcome: accuracies 0-100 and times in ms as its stages recorded them."""
    found = read_results(folder)
    tested, searched, tuned = (found.get(stage, {}) for stage in ("eval", "search", "tune"))
    row: Row = {
        "accuracy": tested.get("accuracy"),
        "dense_accuracy": tested.get("dense_accuracy"),
        "accuracy_plain": tested.get("sparse_accuracy"),
        "accuracy_prompted": tested.get("sparse_accuracy_prompted"),
        "val_accuracy": tuned.get("val_accuracy"),
        "weight_density": searched.get("weight_density"),
        "updates": _total(searched, tuned, "updates"),
        "images_seen": _total(searched, tuned, "images_seen"),
        "train_seconds": _total(searched, tuned, "seconds"),
    }
    return row | _read_times(folder / "bench" / "bench.json")


def _total(searched: Row, tuned: Row, key: str) -> float | None:
    """Over search, which a method may not train in, and tune."""
    return None if key not in tuned else searched.get(key, 0) + tuned[key]


def _read_times(path: Path) -> Row:
    keys = ("image_size", "best_dense", "dense_ms", "sparse_ms", "speedup", "speedup_low", "speedup_high")
    network = read_json(path)["networks"][0] if path.is_file() else {}
    return {key: network.get(key) for key in keys}
