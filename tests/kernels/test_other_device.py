"""Does what runs on a GPU mix devices, or wait for what a tensor holds? Tried where tensors hold nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.triton_calls import ops_with_triton
from tests.kernels import networks

ROOT = Path(__file__).resolve().parents[2]
PASSES = (
    *(f"{stage} {name}" for stage in ("search", "tune") for name in ("triton", "reference")),
    "search channels",
    "refresh",
)


@cache
def found() -> dict[str, Any]:
    """What other_device.py saw; an error of its own is that something was read, or on another device."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.other_device"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", PASSES)
def test_a_training_step_stays_on_its_device_and_reads_nothing(name: str) -> None:
    assert found()["training"][name] == ["nowhere:0"]


@pytest.mark.parametrize("op", ops_with_triton())
def test_kernels_are_started_without_a_look_at_what_tensors_hold(op: str) -> None:
    assert found()["kernels"][op] > 0


@pytest.mark.parametrize("name", ["residual", "vgg", "depthwise"])
def test_an_engine_can_be_recorded(name: str) -> None:
    assert name in networks.ALL
    assert found()["engines"][name] == "torch.Size([3, 5])"
