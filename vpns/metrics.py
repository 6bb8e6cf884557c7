"""Where do metrics go? One JSON line per epoch, and the same as CSV; no row is lost or doubled on resume."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vpns.files import write_text
from vpns.observe import EpochMetrics


class MetricsLog:
    """metrics.jsonl and metrics.csv of a run folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._csv_path = folder / "metrics.csv"

    def append(self, metrics: EpochMetrics) -> None:
        """Write one row, synced before any state that counts on it."""
        with self._path.open("a") as file:
            file.write(_to_line(asdict(metrics)))
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, stage: str, epochs: int) -> None:
        """Drop a stage's rows of later epochs than its state knows, and a last row that a kill tore."""
        kept = [row for row in self.rows() if row["stage"] != stage or row["epoch"] <= epochs]
        write_text(self._path, "".join(map(_to_line, kept)))

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, in the order they were written.

        Raises:
            ValueError: naming the line that is damaged.
        """
        if not self._path.exists():
            return []
        rows = []
        for number, line in enumerate(self._path.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"MetricsLog: expected JSON in line {number} of {self._path}, got {error}"
                ) from error
        return rows

    def write_csv(self) -> None:
        """Bring metrics.csv up to date."""
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        write_text(self._csv_path, table.getvalue())


def _to_line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
