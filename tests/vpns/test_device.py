"""Is a device that is not there refused before any work, with torch's own reason?"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vpns.dry_run import describe_cost, describe_run
from vpns.estimate import Counts, Line, Rates
from vpns.run import execute
from vpns.stages.context import check_device


def no_cuda(*_: Any, **__: Any) -> None:
    raise AssertionError("Torch not compiled with CUDA enabled")


def test_a_torch_without_cuda_is_told_before_any_work(
    tiny_task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", no_cuda)
    config = tiny_task.make_config(device="cuda")
    message = r"expected a device that torch has, got 'cuda' \(Torch not compiled with CUDA enabled\)"
    with pytest.raises(ValueError, match=message):
        execute(tmp_path / "run", config)
    with pytest.raises(ValueError, match=message):
        describe_run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_cpu_is_a_device() -> None:
    check_device("cpu")
    with pytest.raises(ValueError, match="got 'abacus'"):
        check_device("abacus")


def test_memory_of_a_gpu_is_not_estimated_from_the_process(tiny_task: ModuleType) -> None:
    one = Line(0.01, 0.001)
    rates = Rates(dict.fromkeys(("dense", "search", "tune"), one), 0.001, one)
    lines = describe_cost(tiny_task.make_config(device="cuda"), rates, Counts(10, 2, 2), 1)
    assert lines[-1] == "memory: not estimated on cuda"
    assert lines[0].startswith("time: about")
