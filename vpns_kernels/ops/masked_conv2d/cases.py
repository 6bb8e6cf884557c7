"""Layers of the search: the geometries of sparse_conv2d × patterns and densities down to nothing kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops.case import Case
from vpns_kernels.ops.sparse_conv2d.cases import GEOMETRIES, ONE_UNIT, draw_units, make_input
from vpns_kernels.patterns import parse_pattern

PATTERNS = ("unstructured", "block:16x16", "block:32x32", "block:8x4", "nm:2:4")
# A CPU masks channels by an op of their own, which reads activations.
_ALL_PATTERNS = (*PATTERNS, "channel")
_DENSITIES = (0.0, ONE_UNIT, 0.01, 1.0)


def build_args(
    shape: str,
    spec: str,
    density: float,
    memory: str,
    dtype: torch.dtype,
    has_bias: bool,
) -> dict[str, Any]:
    """The arguments of masked_conv2d for a named geometry and a random mask; scores of either sign."""
    geometry, size = GEOMETRIES[shape]
    pattern, generator = parse_pattern(spec), torch.Generator().manual_seed(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(geometry.weight_shape, generator=generator).to(wide)
    units = pattern.units_shape(geometry.weight_shape)
    return {
        "x": make_input(geometry, size, memory, dtype),
        "weight": weight,
        "mask": draw_units(units, density, generator),
        "scores": torch.randn(units, generator=generator).to(wide),
        "geometry": geometry,
        "pattern": pattern,
        "bias": torch.randn(geometry.out_channels, generator=generator).to(wide) if has_bias else None,
    }


def fits(shape: str, spec: str) -> bool:
    """Whether the pattern can mask a layer of this geometry."""
    geometry = GEOMETRIES[shape][0]
    if not spec.startswith("block") or geometry.groups == 1:
        return True
    return geometry.out_channels // geometry.groups % int(spec[6:].split("x")[0]) == 0


_ROWS: list[tuple[str, str, float, str, torch.dtype, bool]] = [
    (shape, spec, 0.2, "channels_last", torch.float32, False)
    for shape in GEOMETRIES
    for spec in _ALL_PATTERNS
    if fits(shape, spec)
]
for _spec in _ALL_PATTERNS:
    _ROWS += [("3x3", _spec, density, "channels_last", torch.float32, True) for density in _DENSITIES]
    _ROWS += [
        ("3x3_stride_2", _spec, 0.3, memory, torch.float32, True) for memory in ("contiguous", "sliced")
    ]
    _ROWS += [
        (shape, _spec, 0.3, "channels_last", dtype, True)
        for shape in ("3x3_batch_in_lanes", "primes", "1x1", "stem_7x7")
        for dtype in (torch.bfloat16, torch.float16)
    ]
    _ROWS += [("mixed_stride_and_padding", _spec, 0.3, "contiguous", torch.float64, True)]


def _name(shape: str, spec: str, density: float, memory: str, dtype: torch.dtype, has_bias: bool) -> str:
    parts = [shape, spec, "one" if density == ONE_UNIT else f"{density:g}", memory, dtype_name(dtype)]
    return "-".join([*parts, *["bias"] * has_bias])


CASES = [Case(_name(*row), partial(build_args, *row)) for row in _ROWS]
