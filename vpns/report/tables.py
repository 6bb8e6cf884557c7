"""Which tables does a report leave? One CSV each, which the plots then read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpns.files import write_text
from vpns.report.facts import TRAINED, Facts
from vpns.report.finding import Finding
from vpns.report.speed import tabulate_engines

Row = dict[str, Any]
_LAYER_COLUMNS = (
    "layer",
    "shape",
    "pattern",
    "density",
    "dense_ms",
    "dense_dtype",
    "sparse_ms",
    "speedup",
    "choice",
    "kernel",
    "reason",
    "share",
)


def build_tables(facts: Facts, findings: Sequence[Finding]) -> dict[str, list[Row]]:
    """Rows of each table, by its name."""
    return {
        "curves": facts.metrics,
        "training": tabulate_training(facts),
        "accuracy": [asdict(pair) for pair in facts.pairs],
        "density": [row | {"shape": _join(row["shape"])} for row in facts.result("search")["layers"]],
        "engines": [row for network in facts.bench["networks"] for row in tabulate_engines(network)],
        "layers": [
            {"image_size": network["image_size"], **{key: row.get(key) for key in _LAYER_COLUMNS}}
            for network in facts.bench["networks"]
            for row in network["layers"]
        ],
        "diagnosis": [asdict(finding) for finding in findings],
    }


def tabulate_training(facts: Facts) -> list[Row]:
    """What each training stage did and took; None where it did not train."""
    keys = ("updates", "images_seen", "seconds", "val_accuracy", "best_epoch")
    return [{"stage": stage} | {key: facts.result(stage).get(key) for key in keys} for stage in TRAINED]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal keys as CSV; None is an empty cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, all values as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _join(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
