"""The report of training, for people: short tables in markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]
PHASES = ("batch", "forward", "backward", "optimizer", "refresh")
PASSES = ("forward", "input_gradient", "weight_gradient")


def table(report: dict[str, Any]) -> str:
    """All parts that were measured, then the goals."""
    found = [
        _iterations(report.get("steps", [])),
        _along(report.get("steps", []), "density", "batch"),
        _along(report.get("steps", []), "batch", "density"),
        _memory(report.get("memory", [])),
        _layers(report.get("layers", [])),
        _ops(report.get("ops", [])),
        _runs(report.get("runs", [])),
    ]
    lines = [line for lines in found if lines for line in [*lines, ""]]
    for target in report["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        why = "" if target["why"] is None else f" ({target['why']})"
        verdict = "met" if target["met"] else "MISSED" if target["value"] is not None else "open"
        lines.append(f"{verdict}: {target['name']}: {value}, wanted {target['wanted']}{why}")
    if report["left_out"]:
        lines.append(f"left out for want of time: {len(report['left_out'])}, {report['left_out'][0]} first")
    return "\n".join(lines)


def _iterations(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [_head("iteration, ms", "arm", *PHASES, "all (p20-p80)", "ms per image", "of fastest torch")]
    for row in rows:
        cell = f"{row['stage']} {row['variant']}, batch {row['batch']}"
        if row["why_not"]:
            lines.append(_line(cell, row["arm"], row["why_not"]))
            continue
        phases = [f"{row['phases'][p]['median_ms']:.0f}" if p in row["phases"] else "-" for p in PHASES]
        whole = row["iteration"]
        spread = f"{whole['median_ms']:.0f} ({whole['p20_ms']:.0f}-{whole['p80_ms']:.0f})"
        ratios = [ratio["median"] for ratio in row["ratios"].values()]
        speedup = f"{min(ratios):.2f}x" if ratios else "-"
        lines.append(_line(cell, row["arm"], *phases, spread, f"{row['ms_per_image']:.1f}", speedup))
    return [*lines, *_prompt_overhead(rows)]


def _prompt_overhead(rows: Sequence[Row]) -> list[str]:
    """What learning the prompt beside the mask costs."""
    by_arm = {(r["stage"], r["variant"], r["batch"], r["arm"]): r for r in rows if r["iteration"]}
    lines = []
    for (*cell, arm), row in by_arm.items():
        alone = by_arm.get((*cell, f"{arm} no prompt"))
        if alone is not None:
            ratio = row["iteration"]["median_ms"] / alone["iteration"]["median_ms"]
            where = f"{cell[0]} {cell[1]}, batch {cell[2]}"
            lines.append(f"prompt and mask over mask alone, {where}, {arm}: {ratio:.2f}x")
    return ["", *lines] if lines else []


def _along(rows: Sequence[Row], axis: str, held: str) -> list[str]:
    """How our iterations scale along an axis, where the other one has its most frequent value."""
    mine = [r for r in rows if r["who"] == "ours" and r["iteration"] and r["variant"] == "framed"]
    mine = [r for r in mine if (r["start"], r["prompt_in"]) == ("uniform", "both")]
    counts = Counter(row[held] for row in mine)
    at = max(counts, key=lambda value: counts[value], default=None)
    mine = [row for row in mine if row[held] == at]
    values = sorted({row[axis] for row in mine})
    if len(values) < 2:
        return []
    lines = [_head(f"ms per image, {held} {at:g}", *(f"{axis} {value:g}" for value in values))]
    for form in sorted({(r["stage"], r["pattern"], r["dtype"]) for r in mine}):
        of_form = [row for row in mine if (row["stage"], row["pattern"], row["dtype"]) == form]
        found = {row[axis]: f"{row['ms_per_image']:.1f}" for row in of_form}
        lines.append(_line(" ".join(form), *(found.get(value, "-") for value in values)))
    return lines


def _memory(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    cells = [_line(f"{r['stage']} {r['variant']}", r["arm"], f"{r['added_mb']:.0f}") for r in rows]
    return [_head("peak memory", "arm", "MB above imports"), *cells]


def _layers(rows: Sequence[Row]) -> list[str]:
    """Geometric means over 3x3 layers, against torch in the same dtype."""
    forms = sorted({(r["stage"], r["pattern"], r["dtype"], -r["density"]) for r in rows})
    lines = [_head("3x3 layers over torch in the dtype", "density", *PASSES)] if forms else []
    for stage, pattern, dtype, negative in forms:
        mine = [
            r
            for r in rows
            if (r["stage"], r["pattern"], r["dtype"], -r["density"]) == (stage, pattern, dtype, negative)
            and r["kernel_size"] == [3, 3]
        ]
        if mine:
            ratios = [geometric_mean([r["ratios"][dtype][p]["median"] for r in mine]) for p in PASSES]
            cells = [f"{ratio:.2f}x" for ratio in ratios]
            lines.append(_line(f"{stage} {pattern} {dtype}", f"{-negative:g}", *cells))
    return lines


def _ops(rows: Sequence[Row]) -> list[str]:
    lines = [_head("op", "case", "arm", "ms by phase")] if rows else []
    for row in rows:
        for arm, phases in row["arms"].items():
            times = ", ".join(f"{name} {sample['median_ms']:.2f}" for name, sample in phases.items())
            lines.append(_line(row["op"], row["case"], arm, times))
    return lines


def _runs(rows: Sequence[Row]) -> list[str]:
    lines = [_head("run", "seconds", "over reference")] if rows else []
    for row in rows:
        if "throughput" in row:
            what = f"two at once, each {row['each']} on {row['threads_each']} threads"
            ratio = f"{row['throughput']['median']:.2f}x of two in sequence"
            lines.append(_line(what, f"{row['seconds']:.1f}", ratio))
            continue
        ratios = [f"{ratio['median']:.2f}x {name}" for name, ratio in row["ratios"].items()]
        lines.append(_line(row["form"], f"{row['seconds']:.1f}", ", ".join(ratios) or "-"))
    return lines


def _head(*cells: str) -> str:
    return _line(*cells) + "\n" + "|" + "---|" * len(cells)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
