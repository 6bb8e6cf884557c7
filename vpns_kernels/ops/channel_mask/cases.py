"""Activations that a channel mask can get wrong: odd channels, few pixels, other ranks and formats."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops.case import Case

_SHAPES: dict[str, tuple[int, ...]] = {
    "layer": (4, 64, 14, 14),
    "wide": (2, 520, 7, 7),
    "odd": (3, 37, 5, 7),
    "one_channel": (2, 1, 3, 3),
    "one_pixel": (1, 16, 1, 1),
    "batch_0": (0, 8, 3, 3),
    "linear": (33, 70),
    "sequence": (2, 9, 17),
}


def _args(shape: str, dtype: torch.dtype, kept: str, memory: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sizes = _SHAPES[shape]
    x = torch.randn(sizes, generator=generator).to(dtype)
    if memory == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif memory == "sliced":
        x = torch.cat((x, torch.full_like(x, float("nan"))), 1).split(sizes[1], 1)[0]
    rank = torch.rand(sizes[1], generator=generator)
    masks = {"some": rank < 0.6, "none": rank < 0, "one": rank == rank.min(), "all": rank < 1}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": x,
        "scores": torch.randn(sizes[1], generator=generator).to(wide),
        "mask": masks[kept],
    }


_ROWS: list[tuple[str, torch.dtype, str, str]] = [
    (shape, dtype, "some", "channels_last")
    for shape in _SHAPES
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]
_ROWS += [("odd", torch.float32, kept, "channels_last") for kept in ("none", "one", "all")]
_ROWS += [
    ("odd", dtype, "some", memory)
    for dtype in (torch.float32, torch.bfloat16)
    for memory in ("contiguous", "sliced")
]

CASES = [
    Case(f"{shape}-{dtype_name(dtype)}-{kept}-{memory}", partial(_args, shape, dtype, kept, memory))
    for shape, dtype, kept, memory in _ROWS
]
