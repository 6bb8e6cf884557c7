"""What do several runs say together? One page and two tables: arms, their differences, and every run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpns.files import make_folder, read_json, write_text
from vpns.report.arms import Arm, Run, compare_arms, group_arms
from vpns.report.blocks import Picture, Section, Table
from vpns.report.compare_plots import draw_comparison
from vpns.report.html import render_html
from vpns.report.ink import save_png
from vpns.report.markdown import render_markdown, show_number
from vpns.report.tables import write_table

_CAPTIONS = {
    "arms": "Mean test accuracy of each arm with its 95 % interval over seeds (Student's t), and every seed.",
    "over_density": "Mean test accuracy over the share of weights that is kept; bars are 95 % intervals.",
    "over_time": "Mean test accuracy over the time of a batch; further left and up is better.",
}
_PLOTS = {"over_density": "Accuracy over density", "over_time": "Accuracy over time"}


def write_comparison(runs: Sequence[Run], folder: Path, title: str, sections: Sequence[Section] = ()) -> Path:
    """Write report.html, report.md, runs.csv, arms.csv, differences.csv and plots.

    Args:
        sections: stand before all others, and tell which arms were to be compared.

    Returns:
        The page.
    """
    arms = group_arms(runs)
    make_folder(folder)
    rows = [_tabulate_arm(arm) for arm in arms]
    pairs = list(_tabulate_pairs(arms))
    write_table(
        folder / "runs.csv", [{"run": r.name, "arm": r.arm, "seed": r.config.seed} | r.row for r in runs]
    )
    write_table(folder / "arms.csv", rows)
    write_table(folder / "differences.csv", pairs)
    plots = draw_comparison(arms)
    for name, figure in plots.items():
        save_png(figure, folder / f"{name}.png")
    pictures = {name: Picture(name, _CAPTIONS[name]) for name in plots}
    page = [
        Section(title, (_summarise(runs, arms),), level=1),
        *sections,
        Section("Arms", (pictures["arms"], _show(rows), "Rows: [arms.csv](arms.csv), [runs.csv](runs.csv).")),
        *([Section("Differences", _show_pairs(pairs))] if pairs and not sections else []),
        *(Section(_PLOTS[name], (pictures[name],)) for name in _PLOTS if name in pictures),
        Section("Runs", (_show_runs(runs, folder),)),
        Section("Diagnosis", _show_diagnosis(runs)),
    ]
    write_text(folder / "report.md", render_markdown(page))
    write_text(folder / "report.html", render_html(page, plots))
    return folder / "report.html"


def _summarise(runs: Sequence[Run], arms: Sequence[Arm]) -> str:
    best = max(arms, key=lambda arm: arm.mean("accuracy") or 0.0)
    dense = [value for arm in arms for value in arm.values("dense_accuracy")]
    seeds = len({run.config.seed for run in runs})
    return (
        f"{len(runs)} runs in {len(arms)} arms of up to {seeds} seeds. Highest mean test accuracy: "
        f"{best.name}, {best.mean('accuracy'):.2f}%; dense {sum(dense) / len(dense):.2f}%. The best of many "
        "arms is partly luck: what was compared, and how often, stands below."
    )


def _tabulate_arm(arm: Arm) -> dict[str, Any]:
    low, high = arm.interval or (None, None)
    keys = ("dense_accuracy", "weight_density", "dense_ms", "sparse_ms", "speedup", "train_seconds")
    own: dict[str, Any] = {"arm": arm.name, "seeds": len(arm.runs), "accuracy": arm.mean("accuracy")}
    return own | {"low": low, "high": high} | {key: arm.mean(key) for key in keys}


def _show(rows: Sequence[dict[str, Any]]) -> Table:
    header = ("", "seeds", "accuracy, %", "95 % interval", "dense, %", "weights kept, %", "dense, ms",
              "sparse, ms", "speedup", "training, s")  # fmt: skip
    return Table(header, [_show_row(row) for row in rows])


def _show_row(row: dict[str, Any]) -> tuple[object, ...]:
    around = "-" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    return (
        row["arm"], row["seeds"], f"{row['accuracy']:.2f}", around, f"{row['dense_accuracy']:.2f}",
        f"{100 * row['weight_density']:.3g}", show_number(row["dense_ms"]), show_number(row["sparse_ms"]),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x", show_number(row["train_seconds"]),
    )  # fmt: skip


def _tabulate_pairs(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """Of every density, the other arms against the first."""
    firsts: dict[str | None, Arm] = {}
    for arm in arms:
        first = firsts.setdefault(arm.density, arm)
        if first is not arm and (test := compare_arms(first, arm)) is not None:
            yield {"first": first.name, "second": arm.name} | vars(test)


def _show_pairs(pairs: Sequence[dict[str, Any]]) -> tuple[str | Table, ...]:
    rows = [
        (
            f"{row['second']} against {row['first']}",
            row["pairs"],
            f"{row['difference']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
            f"{row['p_value']:.2g}",
            f"{row['detectable']:.2f}",
        )
        for row in pairs
    ]
    header = ("", "pairs", "difference, points", "95 % interval", "p", "detectable, points")
    told = (
        "Differences in test accuracy, seed by seed. p is the paired t-test's, of each "
        "comparison by itself; what is detectable is the smallest true difference that so many pairs find "
        "with probability 0.8. Rows: [differences.csv](differences.csv)."
    )
    return told, Table(header, rows)


def _show_runs(runs: Sequence[Run], folder: Path) -> Table:
    header = ("", "seed", "accuracy, %", "dense, %", "weights kept, %", "sparse, ms", "speedup", "report ")
    rows = []
    for run in runs:
        row, page = run.row, run.folder / "report" / "report.html"
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        link = f"[report]({os.path.relpath(page, folder)})" if page.is_file() else "-"
        rows.append(
            (
                run.name, run.config.seed, f"{row['accuracy']:.2f}", f"{row['dense_accuracy']:.2f}",
                f"{100 * row['weight_density']:.3g}", show_number(row["sparse_ms"]), speedup, link,
            )
        )  # fmt: skip
    return Table(header, rows)


def _show_diagnosis(runs: Sequence[Run]) -> tuple[str | Table, ...]:
    """What went wrong in any run, as their own reports say."""
    rows, reported = [], 0
    for run in runs:
        path = run.folder / "report" / "report.json"
        if path.is_file():
            reported += 1
            found = read_json(path)["diagnosis"]
            rows += [
                (run.name, f["name"], "**FAILED**", f["cause"]) for f in found if f["verdict"] == "failed"
            ]
    if not reported:
        return ("None of the runs has a report of its own; vpns report RUN writes one.",)
    if not rows:
        return (f"All is well in the {reported} runs that have a report.",)
    head = f"{len(rows)} checks failed in the {reported} runs that have a report."
    return head, Table(("", "check ", "verdict ", "cause, and what to try "), rows)
