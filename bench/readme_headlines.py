"""The README's table of speed: a few rows of the results, chosen by name, the poor ones among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.readme_source import link, threads_of


@dataclass(frozen=True)
class Whole:
    """A network of `vpns bench`.

    Args:
        against: the dense engine; None for the fastest one in float32 or bfloat16.
    """

    file: str
    model: str
    batch: int
    pattern: str
    density: float = 0.1
    against: str | None = None


@dataclass(frozen=True)
class Iteration:
    """A training iteration of `bench.bench_train`, against the fastest engine of torch."""

    file: str
    stage: str
    variant: str
    pattern: str
    dtype: str
    density: float = 0.1
    canvas: int = 224
    batch: int = 32


HEADLINES: tuple[Whole | Iteration, ...] = (
    Whole("networks-resnet18-zen5", "resnet18", 16, "block:32x32"),
    Whole("networks-resnet18-zen5", "resnet18", 16, "channel"),
    Whole("networks-resnet18-zen5", "resnet18", 16, "unstructured"),
    Whole("networks-resnet50-zen5", "resnet50", 32, "block:32x32"),
    Whole("networks-grouped-zen5", "mobilenet_v2", 16, "unstructured"),
    Whole("networks-grouped-zen5", "mobilenet_v2", 16, "block:16x16", against="openvino int8"),
    Iteration("train-zen5", "search", "released", "block:32x32", "bfloat16"),
    Iteration("train-zen5", "search", "released", "unstructured", "float32"),
)


def render_headlines(folder: Path, rows: Sequence[Whole | Iteration] = HEADLINES) -> str:
    """One row each, with when, on which CPU and at which commit it was measured; files and threads below."""
    paths = {row.file: folder / f"{row.file}.json" for row in rows}
    reports = {name: json.loads(path.read_text()) for name, path in paths.items()}
    machines = {name: report.get("fingerprint") or report["machine"] for name, report in reports.items()}
    lines = ["| what | dense | ours | speed-up (95 %) | measured |", "|---|---|---|---|---|"]
    for row in rows:
        report, machine = reports[row.file], machines[row.file]
        cells = _whole(report, row) if isinstance(row, Whole) else _iteration(report, row)
        measured = f"{machine['date']}, {machine['cpu']}, {machine['commit'][:7]}"
        lines.append(f"| {' | '.join(cells)} | {measured} |")
    ran_on = "; ".join(dict.fromkeys(map(threads_of, machines.values())))
    files = ", ".join(link(path) for path in paths.values())
    return "\n".join([*lines, "", f"{ran_on}. Each row ends with its commit; the files: {files}."])


def _whole(report: dict[str, Any], row: Whole) -> tuple[str, str, str, str]:
    form = (row.model, row.batch, row.pattern, row.density)
    keys = ("model", "batch", "pattern", "density")
    (cell,) = [cell for cell in report["cells"] if tuple(cell[key] for key in keys) == form]
    engine = row.against or cell["best_dense"]
    found = cell["against"][engine]
    what = f"{row.model}, {cell['size']} px, batch {row.batch}: {row.pattern} at density {row.density:g}"
    dense = f"{cell['dense'][engine]['median_ms']:.1f} ms ({engine})"
    return what, dense, f"{cell['sparse_ms']:.1f} ms", _ratio(found)


def _iteration(report: dict[str, Any], row: Iteration) -> tuple[str, str, str, str]:
    place = (row.stage, row.variant, row.canvas, row.batch)
    form = ("ours", row.pattern, row.dtype, row.density, "uniform", "both")
    where = ("stage", "variant", "canvas", "batch")
    kind = ("who", "pattern", "dtype", "density", "start", "prompt_in")
    mine = [s for s in report["steps"] if s["iteration"] and tuple(s[key] for key in where) == place]
    (ours,) = [s for s in mine if tuple(s.get(key) for key in kind) == form]
    times = {s["arm"]: s["iteration"]["median_ms"] for s in mine if s["who"] != "ours"}
    engine = min(ours["ratios"], key=lambda name: ours["ratios"][name]["median"])
    what = f"one iteration of {row.stage}, resnet18, {row.canvas} px, batch {row.batch}: {row.pattern} in "
    return (
        f"{what}{row.dtype} at density {row.density:g}",
        f"{times[engine]:.0f} ms ({engine})",
        f"{ours['iteration']['median_ms']:.0f} ms",
        _ratio(ours["ratios"][engine]),
    )


def _ratio(found: dict[str, float]) -> str:
    text = f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"
    return f"{text}: slower" if found["high"] < 1 else text
