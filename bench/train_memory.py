"""How much memory does training take? The most that a process of its own ever has resident."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.train_loops import Arm, Cell, Sizes, build_loop
from vpns_kernels.measure.timing import Laps
from vpns_kernels.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def bench_memory(cell: Cell, arms: Sequence[Arm], sizes: Sizes) -> list[Row]:
    """Peak resident memory of each arm in a process of its own, above that after imports."""
    rows = []
    for arm in arms:
        asked = json.dumps({"cell": asdict(cell), "arm": asdict(arm), "sizes": asdict(sizes)})
        command = [sys.executable, "-m", "bench.train_memory", asked]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows.append(asdict(cell) | asdict(arm) | {"arm": arm.name} | json.loads(done.stdout))
    return rows


def measure_memory(asked: str) -> dict[str, float]:
    """Megabytes of this process: after imports, and the most after three iterations."""
    wanted = json.loads(asked)
    imported = peak_mb()
    arm, cell, sizes = Arm(**wanted["arm"]), Cell(**wanted["cell"]), Sizes(**wanted["sizes"])
    if arm.who == "ours":
        keep_freed_memory()  # as vpns does
    with tempfile.TemporaryDirectory() as folder:
        loop = build_loop(arm, cell, sizes, Path(folder))
        for _ in range(3):
            loop(Laps())
    return {"imported_mb": imported, "peak_mb": peak_mb(), "added_mb": peak_mb() - imported}


def peak_mb() -> float:
    """The most this process has had resident; getrusage would count the process that started it too."""
    return status_mb("VmHWM")


def status_mb(key: str) -> float:
    """A figure of /proc/self/status, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"status_mb: expected {key} in /proc/self/status, got none")


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1])))
