"""What does an iteration of search or tuning cost, phase by phase, ours against the published scheme?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.train_loops import Arm, Cell, Loop, Sizes, build_loop
from vpns_kernels.measure.gpu import clock_of
from vpns_kernels.measure.timing import Laps, Sample, add_up, compare, interleave_phases

Row = dict[str, Any]


def bench_iterations(cell: Cell, arms: Sequence[Arm], sizes: Sizes, rounds: int) -> list[Row]:
    """A row for each arm; an engine that stops says why in its own."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, Loop] = {}
        stopped: dict[str, str] = {}
        for arm in arms:
            loop = build_loop(arm, cell, sizes, Path(folder))
            if arm.who == "torch.compile":
                # The compiler's own errors derive from RuntimeError: no C++ compiler, an op it cannot lower.
                try:
                    loop(Laps())
                except RuntimeError as error:
                    stopped[arm.name] = f"torch.compile stopped: {' '.join(str(error).split())[:200]}"
                    continue
            loops[arm.name] = loop
        samples = interleave_phases(loops, rounds, clock=clock_of(torch.device(sizes.device)))
    totals = {name: add_up(phases) for name, phases in samples.items()}
    rows = []
    for arm in arms:
        row: Row = (
            asdict(cell) | asdict(arm) | {"arm": arm.name, "canvas": sizes.canvas, "model": sizes.model}
        )
        if arm.name in stopped:
            rows.append(row | {"why_not": stopped[arm.name], "iteration": None})
            continue
        loop, total = loops[arm.name], totals[arm.name]
        rivals = [other.name for other in arms if other.who != "ours" and other.name in totals]
        rows.append(
            row
            | {
                "why_not": None,
                "updates": loop.updates,
                "iteration": total.to_dict(),
                "phases": {phase: sample.to_dict() for phase, sample in samples[arm.name].items()},
                "ms_per_image": total.median_ms / (cell.batch * loop.updates),
                "ratios": _ratios(totals, rivals, total) if arm.who == "ours" else {},
                "layer_density": loop.layer_density,
            }
        )
    return rows


def _ratios(totals: dict[str, Sample], rivals: Sequence[str], mine: Sample) -> dict[str, dict[str, float]]:
    found = {name: compare(totals[name], mine) for name in rivals}
    return {name: asdict(ratio) for name, ratio in found.items()}


def headline_arms(densities: Sequence[float], patterns: Sequence[tuple[str, str]]) -> list[Arm]:
    """Ours at each density, by pattern and dtype."""
    return [Arm("ours", dtype, density, pattern) for density in densities for pattern, dtype in patterns]


def opponents(whos: Sequence[str], dtypes: Sequence[str], density: float) -> list[Arm]:
    """The published scheme, in every engine and dtype."""
    return [Arm(who, dtype, density) for who in whos for dtype in dtypes]


def extra_arms(arm: Arm) -> list[Arm]:
    """The same with the method's own start, and without a prompt."""
    return [replace(arm, start="method"), replace(arm, prompt_in="none")]
