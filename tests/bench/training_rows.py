"""A tiny network to time, and rows of a report as the goals read them."""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.train_loops import Sizes
from vpns_kernels import ConvGeometry
from vpns_kernels.measure.layers import Layer

CONV = Layer("conv", ConvGeometry(16, 24, (3, 3), padding=(1, 1)), 6, 5, count=2)
LINEAR = Layer("fc", ConvGeometry(20, 12, (1, 1)), 1, 1)
SIZES = Sizes("tiny", canvas=16, frame=2, source_classes=12)
LIST = "conv1 3 8 3 3 2 1 1 16 16 1\nconv2 8 8 3 3 1 1 1 8 8 1\nfc 8 12 1 1 1 0 1 1 1 1\n"


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def make_ratio(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value}


def make_step(stage: str, form: str, density: float, ms: float, **ratios: float) -> dict[str, Any]:
    """A row of an iteration as the goals read it; names of engines with _ for their spaces and dots."""
    pattern, dtype = form.split()
    named = {name.replace("__", ".").replace("_", " "): make_ratio(v) for name, v in ratios.items()}
    base = {"stage": stage, "variant": "framed", "batch": 32, "canvas": 224, "who": "ours", "arm": form}
    base |= {"pattern": pattern, "dtype": dtype, "density": density, "start": "uniform", "prompt_in": "both"}
    return base | {"ratios": named, "why_not": None, "iteration": {"median_ms": ms}}


def find(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"].startswith(name))
    return row
