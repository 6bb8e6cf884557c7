"""Layers between masked channels: some geometries of sparse_conv2d × densities down to nothing kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops.case import Case
from vpns_kernels.ops.sparse_conv2d.cases import GEOMETRIES, ONE_UNIT, draw_units, make_input


def build_args(
    shape: str, density: float, memory: str, dtype: torch.dtype, has_bias: bool, masks_outputs: bool = True
) -> dict[str, Any]:
    """The arguments of kept_conv2d for a named geometry and random masks."""
    geometry, size = GEOMETRIES[shape]
    generator = torch.Generator().manual_seed(2)
    K, C = geometry.out_channels, geometry.in_channels
    output_mask, input_mask = (draw_units((count,), density, generator) for count in (K, C))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = make_input(geometry, size, memory, dtype)
    x[:, ~input_mask] = 0
    return {
        "x": x,
        "weight": torch.randn(geometry.weight_shape, generator=generator).to(wide),
        "input_mask": input_mask,
        "geometry": geometry,
        "bias": torch.randn(K, generator=generator).to(wide) if has_bias else None,
        "output_mask": output_mask if masks_outputs else None,
    }


_SHAPES = (
    "3x3",
    "3x3_stride_2",
    "3x3_stride_3_dilation_2",
    "1x1_stride_2",
    "one_pixel",
    "groups_2",
    "batch_0",
)
_ROWS: list[tuple[str, float, str, torch.dtype, bool]] = [
    (shape, 0.3, "channels_last", torch.float32, False) for shape in _SHAPES
]
_ROWS += [("primes", density, "channels_last", torch.float32, True) for density in (0.0, ONE_UNIT, 0.3, 1.0)]
_ROWS += [
    ("mixed_stride_and_padding", 0.3, memory, torch.float32, True) for memory in ("contiguous", "sliced")
]
_ROWS += [("primes", 0.3, "channels_last", dtype, True) for dtype in (torch.bfloat16, torch.float16)]
_ROWS += [("mixed_stride_and_padding", 0.3, "contiguous", torch.float64, True)]


def _name(shape: str, density: float, memory: str, dtype: torch.dtype, has_bias: bool) -> str:
    parts = [shape, "one" if density == ONE_UNIT else f"{density:g}", memory, dtype_name(dtype)]
    return "-".join([*parts, *["bias"] * has_bias])


CASES = [Case(_name(*row), partial(build_args, *row)) for row in _ROWS]
