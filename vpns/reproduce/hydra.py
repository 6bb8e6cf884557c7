"""Experiment 1: VPNs against HYDRA over densities, HYDRA with as many updates and with twice as many."""

from __future__ import annotations

from collections.abc import Sequence

from vpns.config import RunConfig
from vpns.report.arms import Arm
from vpns.reproduce.experiment import Comparison, DottedSettings, Experiment, pair_by_density

VPNS, HYDRA, TWICE = "vpns", "hydra", "hydra_twice"
# The paper's, and beyond: most of them keep what this task needs.
DENSITIES = (0.6, 0.4, 0.2, 0.1, 0.05, 0.02)


def build_axes(config: RunConfig) -> DottedSettings:
    """Two budgets of HYDRA beside VPNs."""
    twice = {"search.epochs": 2 * config.search.epochs, "tune.epochs": 2 * config.tune.epochs}
    methods = {VPNS: {"method": "vpns"}, HYDRA: {"method": "hydra"}, TWICE: {"method": "hydra"} | twice}
    return {"method": methods, "density": list(DENSITIES)}


def compare(arms: Sequence[Arm]) -> list[Comparison]:
    """At every density."""
    return [*pair_by_density(arms, HYDRA, VPNS), *pair_by_density(arms, TWICE, VPNS)]


EXP1 = Experiment(
    name="exp1",
    title="VPNs against HYDRA",
    question="At which densities does VPNs gain accuracy over HYDRA?",
    embedded={"pattern": "unstructured", "prompt.frame": 2, "search.epochs": 30, "tune.epochs": 15},
    seeds=3,
    build_axes=build_axes,
    until="eval",
    compare=compare,
)
