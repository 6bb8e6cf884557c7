"""What came out of a run, in one row? From the records of its finished stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpns.files import read_json

Row = dict[str, Any]


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What each finished stage of a run recorded."""
    return {path.parent.name: read_json(path)["result"] for path in sorted(folder.glob("*/stage.json"))}


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
        "peak_mib": _read_peak(folder / "job.json"),
    }
    row["ms_per_update"] = 1000 * row["train_seconds"] / row["updates"] if row["updates"] else None
    return row | _read_times(folder / "bench" / "bench.json")


def _total(searched: Row, tuned: Row, key: str) -> float | None:
    """Over search, which a method may not train in, and tune."""
    return None if key not in tuned else searched.get(key, 0) + tuned[key]


def _read_peak(path: Path) -> float | None:
    """Memory of the run's process beyond what it had imported, where a sweep did the run."""
    return read_json(path)["peak_bytes"] / 2**20 if path.is_file() else None


def _read_times(path: Path) -> Row:
    keys = ("image_size", "best_dense", "dense_ms", "sparse_ms", "speedup", "speedup_low", "speedup_high")
    network = read_json(path)["networks"][0] if path.is_file() else {}
    return {key: network.get(key) for key in keys}
