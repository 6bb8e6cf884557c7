"""How is a bench report read by people? The whole network against each engine, then its layers."""

from __future__ import annotations

from typing import Any

from vpns.report.markdown import show_number, to_markdown


def to_text(report: dict[str, Any], has_goals: bool = False) -> str:
    """The report in markdown.

    Args:
        has_goals: whether to end with what this project wants of such figures.
    """
    machine = report["machine"]
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    lines = [
        f"{gpu}{machine['cpu']}, {machine['threads']} threads, "
        f"{', '.join(machine['isa']) or 'no native library'}; medians of interleaved calls",
    ]
    for cell in report["cells"]:
        lines += ["", f"## {_title(cell)}", "", _headline(cell), "", _engines(cell), "", _layers(cell)]
    if has_goals:
        lines += ["", "## Goals of this project", "", _goals(report["targets"])]
    return "\n".join(lines)


def _title(cell: dict[str, Any]) -> str:
    return (
        f"{cell['model']}, {cell['pattern']} at density {cell['density']:.3g}, {cell['size']} px, "
        f"batch {cell['batch']}"
    )


def _headline(cell: dict[str, Any]) -> str:
    ratio = f"{cell['speedup']:.2f}x ({cell['speedup_low']:.2f} to {cell['speedup_high']:.2f})"
    if cell["speedup"] < 1:
        ratio = f"**{ratio}: slower**"
    best = f"{cell['best_dense']}, {show_number(cell['dense_ms'])} ms"
    if not cell["best_dense_counts"]:
        best += "; not all were measured that may be the best"
    times = [row["sparse_ms"] for row in cell["seeds"]]
    spread = f", {show_number(min(times))} to {show_number(max(times))} over {len(times)} masks"
    return (
        f"Sparse ({cell['sparse_dtype']}): {show_number(cell['sparse_ms'])} ms"
        f"{spread if len(times) > 1 else ''}; {ratio} against the best dense ({best}). "
        f"{cell['sparse_flops_frac']:.0%} of the FLOPs ran sparse; largest error {cell['max_rel_err']:.2g} "
        "of the largest output."
    )


def _engines(cell: dict[str, Any]) -> str:
    rows = []
    for name, timed in sorted(cell["dense"].items(), key=lambda item: item[1]["median_ms"]):
        ratio = cell["against"].get(name)
        figures = [show_number(timed[key]) for key in ("median_ms", "p20_ms", "p80_ms")]
        won = "-" if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        rows.append((name, *figures, str(timed["rounds"]), won))
    rows += [(name, "-", "-", "-", "-", reason) for name, reason in cell["why_not"].items()]
    return to_markdown(("dense engine", "ms", "20 %", "80 %", "rounds", "sparse is faster by"), rows)


def _layers(cell: dict[str, Any]) -> str:
    rows = [
        (
            row["layer"],
            row["shape"],
            "-" if row["density"] is None else f"{row['density']:.3f}",
            _ms(row["dense_ms"]),
            _ms(row["sparse_ms"]),
            f"{row['choice']}: {row['kernel']}",
            f"{row['share']:.1%}",
            row["reason"],
        )
        for row in cell["layers"]
    ]
    header = ("layer", "shape ", "density", "best dense ms", "sparse ms", "runs ", "of the time", "why ")
    return to_markdown(header, rows)


def _goals(targets: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["name"],
            "not measured" if row["value"] is None else f"{row['value']:.3g}",
            row["wanted"],
            "met" if row["met"] else "MISSED",
        )
        for row in targets
    ]
    return to_markdown(("goal", "value", "wanted", " "), rows)


def _ms(value: float | None) -> str:
    return "-" if value is None else show_number(value)
