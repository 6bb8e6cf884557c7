"""Activations that a batch norm can get wrong: a mean far from zero, odd channels, few pixels, constants."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops.case import Case


def _args(
    shape: tuple[int, ...], dtype: torch.dtype, act: str, has_residual: bool, kind: str
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=generator)
    if kind == "far":
        x = x + 100
    elif kind == "constant":
        x[:, ::2] = 3.0
    x = x.to(dtype)
    if kind != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1]
    residual = torch.randn(shape, generator=generator).to(dtype) if has_residual else None
    return {
        "x": x,
        "weight": torch.rand(channels, generator=generator).to(wide) + 0.5,
        "bias": torch.randn(channels, generator=generator).to(wide),
        "residual": residual,
        "act": act,
    }


_SHAPES = {
    "layer": (4, 64, 14, 14),
    "wide": (2, 520, 7, 7),
    "odd": (3, 37, 5, 7),
    "one_channel": (2, 1, 3, 3),
    "two_values": (2, 16, 1, 1),
}
_ROWS: list[tuple[str, torch.dtype, str, bool, str]] = [
    (shape, dtype, act, has_residual, "plain")
    for shape in _SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for act, has_residual in (("relu", True), ("relu", False), ("none", False))
]
_ROWS += [("layer", torch.float16, "relu6", True, "plain"), ("layer", torch.float64, "relu6", True, "plain")]
_ROWS += [("odd", torch.float32, "relu", True, kind) for kind in ("far", "constant", "contiguous")]

CASES = [
    Case(
        f"{shape}-{dtype_name(dtype)}-{act}{'-residual' if has_residual else ''}-{kind}",
        partial(_args, _SHAPES[shape], dtype, act, has_residual, kind),
    )
    for shape, dtype, act, has_residual, kind in _ROWS
]
