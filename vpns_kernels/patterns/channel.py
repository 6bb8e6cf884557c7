"""Channel: a whole channel of an activation, with every weight that makes or reads it, is one unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vpns_kernels.patterns.base import Pattern, Shape, register


@register
@dataclass(frozen=True)
class Channel(Pattern):
    """One unit per output channel of a weight.

    In the search the mask multiplies the activation, after batch norm, residual add and ReLU: a mask before
    them would give masked channels a zero gradient, and they could never return.
    """

    name: ClassVar[str] = "channel"

    def units_shape(self, weight_shape: Shape) -> Shape:
        return (weight_shape[0],)

    def expand(self, units: Tensor, weight_shape: Shape) -> Tensor:
        return units.reshape(-1, *(1 for _ in weight_shape[1:])).expand(weight_shape)

    def reduce_sum(self, dense: Tensor) -> Tensor:
        return dense.flatten(1).sum(1)
