"""Experiment 3: channels pruned by VPNs, by L1 filter and by DepGraph, with operations and measured time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vpns.config import RunConfig
from vpns.report.arms import Arm, Run, group_arms
from vpns.report.blocks import Section, Table
from vpns.report.markdown import show_number
from vpns.reproduce.experiment import Comparison, DottedSettings, Experiment, Row, pair_by_density
from vpns.run import open_finished
from vpns.stages.networks import load_source
from vpns.stages.pruned import load_pruned
from vpns_kernels.shrink import shrink

# The paper prunes a tenth to a half of the channels.
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5)
METHODS = ("vpns", "l1", "depgraph")


def build_axes(config: RunConfig) -> DottedSettings:
    """Three methods at the paper's densities."""
    return {"method": list(METHODS), "density": list(DENSITIES)}


def compare(arms: Sequence[Arm]) -> list[Comparison]:
    """At every density."""
    return [*pair_by_density(arms, "l1", "vpns"), *pair_by_density(arms, "depgraph", "vpns")]


@torch.no_grad()
def count_operations(run: Run) -> tuple[int, int]:
    """Multiply-adds of one image: dense, and of what is left when channels are cut out."""
    context = open_finished(run.folder)
    pruned = load_pruned(context).cpu()
    canvas = run.config.prompt.canvas
    x = torch.zeros(1, 3, canvas, canvas)
    networks = (load_source(context).eval().cpu(), shrink(pruned.network))
    counts = []
    for network in networks:
        counter = FlopCounterMode(display=False)
        with counter:
            network(x)
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def tabulate(runs: Sequence[Run]) -> list[Row]:
    """What is left: operations, in the mean over seeds, and the time of the first."""
    rows = []
    for arm in group_arms(runs):
        dense, sparse = zip(*(count_operations(run) for run in arm.runs), strict=True)
        own: dict[str, Any] = {
            "arm": arm.name,
            "accuracy": arm.mean("accuracy"),
            "dense_operations": dense[0],
            "operations": statistics.fmean(sparse),
        }
        own |= {key: arm.mean(key) for key in ("dense_ms", "sparse_ms", "speedup")}
        rows.append(own)
    return rows


def tell(rows: Sequence[Row]) -> Section:
    """The table for people."""
    header = (
        "",
        "accuracy, %",
        "multiply-adds",
        "of dense",
        "dense, ms",
        "sparse, ms",
        "faster",
        "promised",
    )
    shown = [
        (
            row["arm"],
            f"{row['accuracy']:.2f}",
            f"{row['operations'] / 1e6:,.1f} M",
            f"{row['operations'] / row['dense_operations']:.1%}",
            show_number(row["dense_ms"]),
            show_number(row["sparse_ms"]),
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['dense_operations'] / row['operations']:.2f}x",
        )
        for row in rows
    ]
    told = (
        "Multiply-adds are those of the smaller network that is left when channels are cut out; what they "
        "promise stands beside the time that was measured, of the first seed's network, against the fastest "
        "dense engine."
    )
    return Section("Operations and time", (Table(header, shown), told))


EXP3 = Experiment(
    name="exp3",
    title="Channels: VPNs, L1 filter and DepGraph",
    question="Which method keeps most accuracy at equal channels, and what do they gain in time?",
    embedded={"pattern": "channel", "search.epochs": 30, "tune.epochs": 15},
    seeds=3,
    build_axes=build_axes,
    until="report",
    compare=compare,
    tabulate=tabulate,
    tell=tell,
)
