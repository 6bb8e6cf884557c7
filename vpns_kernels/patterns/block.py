"""Block: `bk` output channels × `bc` input channels of one filter tap stand or fall together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.patterns.base import Pattern, Shape, register


@register
@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of bk × bc channels per tap; a ragged edge block holds fewer weights and counts as one."""

    bk: int = 32
    bc: int = 32
    name: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        if self.bk < 1 or self.bc < 1:
            raise ValueError(f"Block: expected bk >= 1 and bc >= 1, got {self.bk}x{self.bc}")

    @property
    def spec(self) -> str:
        return f"{self.name}:{self.bk}x{self.bc}"

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> Block:
        if not arguments:
            return cls()
        match = re.fullmatch(r"(\d+)x(\d+)", arguments[0])
        if len(arguments) != 1 or match is None:
            given = ":".join([cls.name, *arguments])
            raise ValueError(f"parse_pattern: expected block:BKxBC such as block:32x32, got {given!r}")
        return cls(int(match[1]), int(match[2]))

    def units_shape(self, weight_shape: Shape) -> Shape:
        K, C, *taps = weight_shape
        return (-(-K // self.bk), -(-C // self.bc), *taps)

    def expand(self, units: Tensor, weight_shape: Shape) -> Tensor:
        K, C = weight_shape[:2]
        return units.repeat_interleave(self.bk, 0)[:K].repeat_interleave(self.bc, 1)[:, :C]

    def reduce_sum(self, dense: Tensor) -> Tensor:
        blocks_k, blocks_c, *taps = self.units_shape(tuple(dense.shape))
        missing_k = blocks_k * self.bk - dense.shape[0]
        missing_c = blocks_c * self.bc - dense.shape[1]
        padded = F.pad(dense, (0, 0) * len(taps) + (0, missing_c, 0, missing_k))
        return padded.reshape(blocks_k, self.bk, blocks_c, self.bc, *taps).sum(dim=(1, 3))
