"""How do the parts that were measured on a GPU become one report, and a short table?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.gpu_layers import add_roofline
from bench.gpu_targets import NETWORKS, gpu_targets

Row = dict[str, Any]
# What tells rows apart.
_KEYS = (
    "model",
    "network",
    "layer",
    "op",
    "case",
    "stage",
    "arm",
    "pass",
    "pattern",
    "density",
    "backend",
    "kernel",
)


def finish_row(row: Row, ceilings: dict[str, float]) -> None:
    """Shares of what the GPU could do, where a row says what it had to do."""
    if "kept_flops" in row:
        add_roofline(row, ceilings)
    elif "least_mb" in row:
        row["copy_frac"] = 1e-3 * row["least_mb"] / ceilings["copy_tb_per_s"] / row["ours"]["median_ms"]


def latest(rows: Sequence[Row]) -> list[Row]:
    """Without rows that were measured again later, against more opponents."""
    return list({tuple(row.get(key) for key in _KEYS): row for row in rows}.values())


def merge(report: Row, measured: dict[str, Row]) -> Row:
    """The report with these parts, old ones of the same name replaced."""
    parts = {**report.get("parts", {}), **measured}
    rows = {name: part["rows"] for name, part in parts.items()}
    grouped = {name: rows.get(name, []) for name in ("ops", "layers", "steps")}
    grouped["networks"] = [row for model in NETWORKS for row in rows.get(model, [])]
    return {"schema_version": 1, "parts": parts, "targets": gpu_targets(grouped)}


def table(report: Row) -> str:
    """The report in short."""
    lines = []
    for name, part in report["parts"].items():
        machine, ceilings = part["fingerprint"], part["ceilings"]
        ceiling = ", ".join(f"{key} {value:.3g}" for key, value in ceilings.items())
        lines.append(
            f"{name}: {machine.get('gpu', machine['device'])}, commit {machine['commit']}; {ceiling}"
        )
        lines += [f"  {_line(row)}" for row in part["rows"]]
        lines += [f"  stopped {job}: {why}" for job, why in part["stopped"].items()]
        if part["left_out"]:
            lines.append(f"  left out for want of time: {', '.join(part['left_out'])}")
    for target in report["targets"]:
        if target["value"] is not None:
            why = "" if target["why"] is None else f" ({target['why']})"
            verdict = "met   " if target["met"] else "MISSED"
            lines.append(f"{verdict} {target['name']}: {target['value']:.3g}, wanted {target['wanted']}{why}")
    missing = [target["name"] for target in report["targets"] if target["value"] is None]
    if missing:
        lines.append(f"not measured: {len(missing)} goals, {missing[0]} first")
    return "\n".join(lines)


def _line(row: Row) -> str:
    """What was run, how long ours took, and how many times as fast as each opponent that is."""
    what = " ".join(f"{row[key]:g}" if key == "density" else str(row[key]) for key in _KEYS if key in row)
    ours = row.get("ours") or row.get("iteration")
    if ours is None:
        return f"{what}: {row['why_not']}"
    ratios = ", ".join(f"{name} {ratio['median']:.2f}x" for name, ratio in row["ratios"].items())
    share = (
        "" if "roofline" not in row else f", {row['roofline']['share']:.0%} of {row['roofline']['bound_by']}"
    )
    return f"{what}: {ours['median_ms']:.4g} ms; {ratios}{share}"
