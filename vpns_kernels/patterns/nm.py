"""N:M: of every M neighbouring input channels at a fixed tap, N weights are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.patterns.base import Pattern, Shape, register


@register
@dataclass(frozen=True)
class NM(Pattern):
    """Keep n of every m weights along the input channels; units are weights, each group its own budget."""

    n: int = 2
    m: int = 4
    name: ClassVar[str] = "nm"
    is_global: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM: expected 1 <= n <= m, got {self.n}:{self.m}")

    @property
    def spec(self) -> str:
        return f"{self.name}:{self.n}:{self.m}"

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> NM:
        if not arguments:
            return cls()
        if len(arguments) != 2 or not all(argument.isdigit() for argument in arguments):
            given = ":".join([cls.name, *arguments])
            raise ValueError(f"parse_pattern: expected nm:N:M such as nm:2:4, got {given!r}")
        return cls(int(arguments[0]), int(arguments[1]))

    def units_shape(self, weight_shape: Shape) -> Shape:
        return weight_shape

    def expand(self, units: Tensor, weight_shape: Shape) -> Tensor:
        return units.expand(weight_shape)

    def reduce_sum(self, dense: Tensor) -> Tensor:
        return dense

    def check_density(self, density: float) -> float:
        if abs(density - self.n / self.m) > 1e-9:
            raise ValueError(f"density: expected {self.n / self.m} for pattern {self.spec}, got {density}")
        return density

    def keep_largest(self, scores: Tensor) -> Tensor:
        """Bool mask of the n largest magnitudes of each group; ties keep the lower channel; a ragged last
        group keeps up to n of what it has."""
        magnitude = scores.detach().abs().movedim(1, -1)
        C = magnitude.shape[-1]
        padded = F.pad(magnitude, (0, -C % self.m), value=-1.0)
        groups = padded.reshape(*padded.shape[:-1], -1, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        return mask.flatten(-2)[..., :C].movedim(-1, 1).contiguous()
