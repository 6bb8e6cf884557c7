"""What is a pattern? The rule a mask obeys: which weights stand or fall together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pattern(ABC):
    """Groups the weights of a layer into units; density counts units, scores and masks have one entry per
    unit.

    A weight is [K, C/groups, R, S] (convolution) or [K, C] (linear).
    """

    name: ClassVar[str]
    # Whether units of all layers compete for one global budget; otherwise each layer keeps its own share.
    is_global: ClassVar[bool] = True

    @property
    def spec(self) -> str:
        """The text form, as in configurations and manifests: parse_pattern(p.spec) == p."""
        return self.name

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> Pattern:
        """Build from what follows the name in a spec, split at colons."""
        if arguments:
            given = ":".join([cls.name, *arguments])
            raise ValueError(f"parse_pattern: expected {cls.name!r} without arguments, got {given!r}")
        return cls()

    @abstractmethod
    def units_shape(self, weight_shape: Shape) -> Shape:
        """Shape of the scores and of the unit mask of a weight."""

    @abstractmethod
    def expand(self, units: Tensor, weight_shape: Shape) -> Tensor:
        """Each weight's own copy of its unit's value: [*units_shape] → [*weight_shape]."""

    @abstractmethod
    def reduce_sum(self, dense: Tensor) -> Tensor:
        """Sum over the weights of each unit: [*weight_shape] → [*units_shape]."""

    def check_density(self, density: float) -> float:
        """The density itself where the pattern can have it; ValueError otherwise."""
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density: expected a kept fraction in (0, 1], got {density}")
        return density


PATTERNS: dict[str, type[Pattern]] = {}


def register(pattern: type[Pattern]) -> type[Pattern]:
    """Class decorator: makes the pattern known under its name."""
    PATTERNS[pattern.name] = pattern
    return pattern


def parse_pattern(spec: str) -> Pattern:
    """The pattern of a text form such as "unstructured", "block:32x32", "channel" or "nm:2:4"."""
    name, *arguments = spec.split(":")
    if name not in PATTERNS:
        raise ValueError(f"parse_pattern: expected one of {sorted(PATTERNS)}, got {spec!r}")
    build: Callable[[list[str]], Pattern] = PATTERNS[name].from_arguments
    return build(arguments)
