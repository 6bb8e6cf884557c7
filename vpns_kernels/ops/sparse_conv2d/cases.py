"""Layers that a sparse convolution can get wrong: strides, edges, groups and densities that differ inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.formats import pack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops.case import Case
from vpns_kernels.patterns import Channel, parse_pattern

GEOMETRIES: dict[str, tuple[ConvGeometry, tuple[int, int, int]]] = {
    "3x3": (ConvGeometry(32, 32, (3, 3), padding=(1, 1)), (2, 14, 14)),
    "3x3_batch_in_lanes": (ConvGeometry(32, 48, (3, 3), padding=(1, 1)), (19, 7, 7)),
    "3x3_stride_2": (ConvGeometry(32, 64, (3, 3), (2, 2), (1, 1)), (16, 13, 14)),
    "3x3_stride_3_dilation_2": (ConvGeometry(16, 32, (3, 3), (3, 3), (2, 2), (2, 2)), (3, 17, 19)),
    "mixed_stride_and_padding": (ConvGeometry(33, 17, (3, 5), (1, 2), (0, 3), (2, 1)), (9, 11, 13)),
    "1x1": (ConvGeometry(64, 96, (1, 1)), (8, 5, 5)),
    "1x1_stride_2": (ConvGeometry(64, 32, (1, 1), (2, 2)), (17, 7, 7)),
    "1x1_padded": (ConvGeometry(16, 16, (1, 1), padding=(1, 1)), (2, 3, 3)),
    "stem_7x7": (ConvGeometry(3, 64, (7, 7), (2, 2), (3, 3)), (2, 29, 31)),
    "linear": (ConvGeometry(130, 70, (1, 1)), (33, 1, 1)),
    "groups_2": (ConvGeometry(64, 64, (3, 3), padding=(1, 1), groups=2), (4, 6, 7)),
    "one_pixel": (ConvGeometry(32, 32, (3, 3), padding=(1, 1)), (16, 1, 1)),
    "few_pixels": (ConvGeometry(32, 48, (3, 3), (2, 2), (1, 1), (1, 2)), (6, 2, 3)),
    "one_column": (ConvGeometry(8, 16, (3, 1), padding=(1, 0)), (5, 40, 1)),
    "primes": (ConvGeometry(37, 29, (3, 3), padding=(1, 1)), (7, 11, 23)),
    "batch_0": (ConvGeometry(32, 32, (3, 3), padding=(1, 1)), (0, 14, 14)),
    "batch_1": (ConvGeometry(32, 32, (3, 3), padding=(1, 1)), (1, 56, 5)),
    "depthwise": (ConvGeometry(24, 24, (3, 3), padding=(1, 1), groups=24), (3, 9, 9)),
    "depthwise_strided": (ConvGeometry(37, 37, (3, 5), (2, 3), (1, 4), (2, 1), groups=37), (2, 11, 23)),
    "groups_of_4": (ConvGeometry(32, 32, (3, 3), padding=(1, 1), groups=8), (3, 9, 9)),
    "groups_of_8": (ConvGeometry(48, 48, (3, 3), (2, 2), (1, 1), groups=6), (2, 11, 10)),
    "even_filter": (ConvGeometry(16, 16, (2, 4), padding=(1, 2)), (2, 8, 8)),
}
# A density: the one unit that a random draw ranks first.
ONE_UNIT = -1.0
_DENSITIES = (0.0, ONE_UNIT, 0.01, 1.0)
PATTERNS = ("unstructured", "block:16x16", "block:32x32", "block:8x4", "channel")


def make_input(geometry: ConvGeometry, size: tuple[int, int, int], memory: str, dtype: torch.dtype) -> Tensor:
    """Random input [N, C, H, W] for a geometry, the same at each call.

    Args:
        memory: "channels_last", "sliced" (a view into a larger tensor of NaN), or else contiguous.
    """
    generator = torch.Generator().manual_seed(1)
    images, height, width = size
    x = torch.randn(images, geometry.in_channels, height, width, generator=generator).to(dtype)
    if memory == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if memory == "sliced":
        # What lies around the slice must not be read.
        channels = geometry.in_channels
        large = torch.full((images, height + 3, width + 2, channels + 5), float("nan"), dtype=dtype)
        view = large[:, 1 : height + 1, 2 : width + 2, 3 : channels + 3].permute(0, 3, 1, 2)
        return view.copy_(x)
    return x


def build_args(
    shape: str, spec: str, density: float, memory: str, dtype: torch.dtype, has_bias: bool
) -> dict[str, Any]:
    """The arguments of sparse_conv2d for a named geometry and a random mask."""
    geometry, size = GEOMETRIES[shape]
    pattern, generator = parse_pattern(spec), torch.Generator().manual_seed(2)
    weight = torch.randn(geometry.weight_shape, generator=generator).to(dtype)
    if isinstance(pattern, Channel):
        kept = [draw_units((n,), density, generator) for n in geometry.weight_shape[:2]]
        mask = (kept[0][:, None] & kept[1][None, :])[..., None, None].expand_as(weight)
    else:
        units = draw_units(pattern.units_shape(geometry.weight_shape), density, generator)
        mask = pattern.expand(units, geometry.weight_shape)
    packed = pack(weight, mask.contiguous(), pattern, geometry)
    bias = torch.randn(geometry.out_channels, generator=generator).to(dtype) if has_bias else None
    return {
        "x": make_input(geometry, size, memory, dtype),
        "values": packed.values,
        "layout": packed.layout,
        "geometry": geometry,
        "bias": bias,
    }


def draw_units(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    """A random mask; at ONE_UNIT of one unit."""
    rank = torch.rand(shape, generator=generator)
    return rank == rank.min() if density == ONE_UNIT else rank < density


def fits(shape: str, spec: str) -> bool:
    """Whether the pattern can prune a layer of this geometry."""
    grouped = GEOMETRIES[shape][0].groups > 1
    return not grouped or spec == "unstructured" or (spec.startswith("block") and shape == "groups_2")


_ROWS: list[tuple[str, str, float, str, torch.dtype, bool]] = [
    (shape, spec, 0.2, "channels_last", torch.float32, False)
    for shape in GEOMETRIES
    for spec in PATTERNS
    if fits(shape, spec)
]
_ROWS += [
    ("depthwise", "unstructured", density, memory, dtype, True)
    for density in (ONE_UNIT, 0.7, 1.0)
    for memory, dtype in (("sliced", torch.float32), ("channels_last", torch.bfloat16))
]
_ROWS += [
    (shape, spec, 1.0, memory, dtype, True)
    for shape, spec in (("groups_of_4", "block:4x4"), ("groups_of_8", "block:8x8"))
    for memory, dtype in (("sliced", torch.float32), ("channels_last", torch.bfloat16))
]
for _spec in PATTERNS:
    _ROWS += [("3x3", _spec, density, "channels_last", torch.float32, True) for density in _DENSITIES]
    _ROWS += [
        ("3x3_stride_2", _spec, 0.3, memory, torch.float32, True) for memory in ("contiguous", "sliced")
    ]
    _ROWS += [
        (shape, _spec, 0.3, "channels_last", dtype, True)
        for shape in ("3x3_batch_in_lanes", "1x1")
        for dtype in (torch.bfloat16, torch.float16)
    ]
    _ROWS += [("mixed_stride_and_padding", _spec, 0.3, "contiguous", torch.float64, True)]


def _name(shape: str, spec: str, density: float, memory: str, dtype: torch.dtype, has_bias: bool) -> str:
    parts = [shape, spec, "one" if density == ONE_UNIT else f"{density:g}", memory, dtype_name(dtype)]
    return "-".join([*parts, *["bias"] * has_bias])


CASES = [Case(_name(*row), partial(build_args, *row)) for row in _ROWS]
