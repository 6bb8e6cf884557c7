"""Inputs that a selection can get wrong: ties, zeros, infinities, one entry, many tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.ops.case import Case


def _args(shapes: list[tuple[int, ...]], density: float, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    if kind == "ties":
        scores = [(tensor * 2).round() / 2 for tensor in scores]
    elif kind == "equal":
        scores = [torch.full_like(tensor, -0.25) for tensor in scores]
    elif kind == "zeros":
        scores = [tensor * (torch.rand(tensor.shape, generator=generator) < 0.01) for tensor in scores]
    elif kind == "infinite":
        scores[0].view(-1)[::7] = float("inf")
    elif kind == "strided":
        scores = [tensor.transpose(0, 1) for tensor in scores]
    return {"scores": scores, "density": density}


_NETWORK: list[tuple[int, ...]] = [(64, 3, 7, 7), (64, 64, 3, 3), (128, 64, 1, 1), (1000, 512), (0, 3)]
_ROWS: list[tuple[str, list[tuple[int, ...]], float, str, torch.dtype]] = [
    ("network", _NETWORK, 0.1, "plain", torch.float32),
    ("network_half", _NETWORK, 0.5, "plain", torch.float32),
    ("network_all", _NETWORK, 1.0, "plain", torch.float32),
    ("network_float64", _NETWORK, 0.3, "plain", torch.float64),
    ("ties", _NETWORK, 0.2, "ties", torch.float32),
    ("all_equal", [(13, 7)], 0.37, "equal", torch.float32),
    ("mostly_zero", [(50, 50), (7,)], 0.5, "zeros", torch.float32),
    ("infinite", [(64, 9)], 0.05, "infinite", torch.float32),
    ("strided", [(31, 17), (5, 1024)], 0.25, "strided", torch.float32),
    ("one_entry", [(1,)], 0.001, "plain", torch.float32),
    ("large", [(300_000,), (1_000_003,)], 0.01, "plain", torch.float32),
]

CASES = [Case(row[0], partial(_args, *row[1:])) for row in _ROWS]
