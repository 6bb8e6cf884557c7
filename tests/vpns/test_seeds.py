"""Do whole runs end alike through the kernels and through the dense reference? Five seeds of each."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest

from vpns.config import ModelConfig, RunConfig
from vpns.run import execute

SEEDS = range(5)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_accuracies_of_five_seeds_overlap(tmp_path: Path) -> None:
    # Pretrained once: what is compared begins behind it.
    execute(tmp_path / "letters", RunConfig(threads=2), "pretrain")
    found: dict[str, list[float]] = {}
    for backend in ("auto", "reference"):
        for seed in SEEDS:
            config = RunConfig(
                model=ModelConfig(weights=str(tmp_path / "letters")), backend=backend, seed=seed, threads=2
            )
            records = execute(tmp_path / f"{backend}-{seed}", config, "eval")
            found.setdefault(backend, []).append(records["eval"].result["accuracy"])
    kernels, reference = found["auto"], found["reference"]
    apart = abs(statistics.mean(kernels) - statistics.mean(reference))
    spread = max(statistics.stdev(kernels), statistics.stdev(reference))
    assert apart <= spread, dataclasses.asdict(config) | found
    assert max(min(kernels), min(reference)) <= min(max(kernels), max(reference)), found
