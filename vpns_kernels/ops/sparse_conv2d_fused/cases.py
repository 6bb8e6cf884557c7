"""What can follow a sparse convolution: activations, residuals and pairs of types, on each kind of layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops.case import Case
from vpns_kernels.ops.sparse_conv2d.cases import GEOMETRIES, ONE_UNIT, build_args, fits

_PATTERNS = ("unstructured", "block:16x16", "block:32x32", "channel")
_HALVES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Row:
    """One case.

    Args:
        values_dtype: of the weights; that of x by default.
        residual: how it lies in memory, or empty for none.
    """

    shape: str
    spec: str
    density: float = 0.2
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    values_dtype: torch.dtype | None = None
    memory: str = "channels_last"
    has_bias: bool = True
    residual: str = "channels_last"
    act: str = "relu"

    @property
    def name(self) -> str:
        density = "one" if self.density == ONE_UNIT else f"{self.density:g}"
        types = [t for t in (self.dtype, self.values_dtype, self.out_dtype) if t is not None]
        parts = [self.shape, self.spec, density, self.memory, *(dtype_name(t) for t in types), self.act]
        parts += ["bias"] * self.has_bias + [f"residual_{self.residual}"] * bool(self.residual)
        return "-".join(parts)

    def build(self) -> dict[str, Any]:
        args = build_args(self.shape, self.spec, self.density, self.memory, self.dtype, self.has_bias)
        if self.values_dtype is not None:
            args["values"] = args["values"].to(self.values_dtype)
        x, geometry = args["x"], args["geometry"]
        if self.residual:
            shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
            generator = torch.Generator().manual_seed(4)
            # Above 6 here and there, so that relu6 has something to cut.
            residual = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
            residual = residual.to(self.out_dtype or self.dtype)
            is_last = self.residual == "channels_last"
            args["residual"] = residual.contiguous(memory_format=torch.channels_last) if is_last else residual
        return args | {"act": self.act, "out_dtype": self.out_dtype}


_ROWS = [_Row(shape, spec) for shape in GEOMETRIES for spec in _PATTERNS if fits(shape, spec)]
_ROWS += [_Row("depthwise", "unstructured", 0.7, dtype=x, out_dtype=y) for x in _HALVES for y in _HALVES]
_ROWS += [
    _Row(shape, spec, 1.0, dtype=x, out_dtype=y)
    for shape, spec in (("groups_of_4", "block:4x4"), ("groups_of_8", "block:8x8"))
    for x in _HALVES
    for y in _HALVES
]
for _spec in _PATTERNS:
    _ROWS += [_Row("3x3", _spec, density, act="relu6") for density in (0.0, ONE_UNIT, 1.0)]
    _ROWS += [_Row("3x3_stride_2", _spec, memory=m, residual="contiguous") for m in ("contiguous", "sliced")]
    _ROWS += [
        _Row("3x3_batch_in_lanes", _spec, has_bias=has_bias, residual=residual, act=act)
        for has_bias in (False, True)
        for residual in ("", "channels_last")
        for act in ("none", "relu", "relu6")
    ]
    _ROWS += [_Row("3x3", _spec, dtype=x, out_dtype=y, act="relu6") for x in _HALVES for y in _HALVES]
    _ROWS += [_Row("1x1", _spec, dtype=t, residual="", act="none") for t in _HALVES[1:]]
    _ROWS += [_Row("1x1", _spec, dtype=t, values_dtype=torch.float32) for t in _HALVES[1:]]
    _ROWS += [_Row("mixed_stride_and_padding", _spec, dtype=torch.float64, out_dtype=torch.float64)]

CASES = [Case(row.name, row.build) for row in _ROWS]
