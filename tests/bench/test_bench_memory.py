"""Does the bench of deployed memory count what an engine takes, and nothing else?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bench.bench_memory import measure_apart
from vpns_kernels import compile


def test_what_weights_and_activations_take_is_counted(tmp_path: Path) -> None:
    """Sixteen million float32 activations cannot hide, and libraries do not count."""
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1)).eval()
    compile(network, torch.zeros(1, 3, 16, 16), "float32").save(tmp_path / "small")
    compile(network, torch.zeros(1, 3, 512, 512), "float32").save(tmp_path / "large")
    small = measure_apart("vpns", tmp_path / "small", [1, 3, 16, 16])
    large = measure_apart("vpns", tmp_path / "large", [1, 3, 512, 512])
    assert small["imported_mb"] > 50
    assert small["added_mb"] < 30
    assert large["added_mb"] - small["added_mb"] > 64 * 512 * 512 * 4 / 1e6
    assert large["added_mb"] >= large["loaded_mb"]
