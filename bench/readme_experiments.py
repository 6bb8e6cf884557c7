"""The tables of what was learned: the experiments of `vpns reproduce`, and what each prompt costs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.readme_source import link, where

EXPERIMENTS = ("arms", "exp1", "exp2", "exp3")


def find_experiments(folder: Path) -> list[Path]:
    """The results of those that were done, in their order."""
    return [path for name in EXPERIMENTS for path in sorted(folder.glob(f"{name}-*.json"))]


def render_experiments(paths: Sequence[Path]) -> str:
    """What each experiment asked, and found."""
    return "\n\n".join(map(render_experiment, paths))


def render_experiment(path: Path) -> str:
    """Its question, and a row for each comparison."""
    report = json.loads(path.read_text())
    source = f"({where(report['machine'])}; {link(path)})"
    lines = [
        f"{report['question']} `vpns reproduce {report['experiment']}` {source}:",
        "",
        "| | difference in points (95 %) | p | pairs of runs | could be seen |",
        "|---|---|---|---|---|",
    ]
    for test in report["tests"]:
        # Arms are lettered.
        first, second = (
            re.sub(r"^([a-d])_", r"(\1) ", test[name]).replace("_", " ") for name in ("first", "second")
        )
        name = f"{second} against {first}{' (primary)' if test['is_primary'] else ''}"
        points = f"{test['difference']:+.1f} ({test['low']:+.1f} to {test['high']:+.1f})"
        numbers = f"{test['p_value']:.2g} | {test['pairs']} | {test['detectable']:.1f}"
        lines.append(f"| {name} | {points} | {numbers} |")
    costs = {"exp2": _frame_costs, "exp3": _channel_costs}.get(report["experiment"])
    if costs is not None:
        lines += ["", *costs(report["table"])]
    return "\n".join(lines)


def _frame_costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a wider frame costs."""
    lines = [
        "| frame | parameters | accuracy, % | ms per update | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['frame']} of {row['of_canvas']} px | {row['parameters']:,} | {row['accuracy']:.1f} | "
        f"{row['ms_per_update']:.0f} | {row['peak_mib']:.0f} |"
        for row in rows
    ]


def _channel_costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What multiply-adds promise, and what was measured."""
    lines = [
        "| channels | accuracy, % | multiply-adds left | promised | measured, over the best dense |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        left = row["operations"] / row["dense_operations"]
        lines.append(
            f"| {row['arm']} | {row['accuracy']:.1f} | {left:.0%} | {1 / left:.1f}x | {row['speedup']:.1f}x "
            f"({row['sparse_ms']:.1f} ms) |"
        )
    return lines


def render_prompts(folder: Path) -> str:
    """What a forward and backward pass through prompt and first convolution costs with each kind."""
    return "\n\n".join(map(_prompt_table, sorted(folder.glob("prompts-*.json"))))


def _prompt_table(path: Path) -> str:
    report = json.loads(path.read_text())
    rows = report["rows"]
    lines = [
        f"The prompt with ResNet-18's first convolution, forward and gradients, {rows[0]['batch']} images on "
        f"a canvas of {rows[0]['canvas']} px, frame {rows[0]['frame']} "
        f"({where(report['fingerprint'])}; {link(path)}):",
        "",
        "| prompt | parameters | image, px | ms (20th to 80th percentile) | memory, MB | in one kernel |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['prompt']} | {row['entries']:,} | {row['image_size']} | {row['median_ms']:.0f} "
        f"({row['p20_ms']:.0f} to {row['p80_ms']:.0f}) | {row['added_mb']:.0f} | "
        f"{'yes' if row['fused'] else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines)
