"""Unstructured: every weight is a unit of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vpns_kernels.patterns.base import Pattern, Shape, register


@register
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight is kept or dropped alone."""

    name: ClassVar[str] = "unstructured"

    def units_shape(self, weight_shape: Shape) -> Shape:
        return weight_shape

    def expand(self, units: Tensor, weight_shape: Shape) -> Tensor:
        return units.expand(weight_shape)

    def reduce_sum(self, dense: Tensor) -> Tensor:
        return dense
