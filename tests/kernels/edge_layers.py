"""Small layers at the edges of the kernels' tiles, as one record that a failing test prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vpns_kernels import ConvGeometry, pack, parse_pattern
from vpns_kernels.formats import Packed

Pair = tuple[int, int]


@dataclass(frozen=True)
class EdgeLayer:
    """One layer with its input.

    Args:
        kept: "some" units, "none", "one", "all", or "some" but none in every other "row" (output channels)
            or "column" (input channels).
        memory: of the input: "channels_last", "contiguous", or "sliced" from a larger tensor of NaN.
        out_dtype: of the output and the residual; the input's own where empty.
    """

    images: int = 2
    channels: int = 5
    filters: int = 9
    height: int = 5
    width: int = 7
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    pattern: str = "unstructured"
    dtype: str = "float32"
    kept: str = "some"
    has_bias: bool = True
    memory: str = "channels_last"
    has_residual: bool = False
    act: str = "none"
    out_dtype: str = ""
    seed: int = 0

    @property
    def geometry(self) -> ConvGeometry:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return ConvGeometry(self.channels, self.filters, *sizes)

    @property
    def is_valid(self) -> bool:
        """Whether the filter fits the padded input, and the pattern the groups."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        room = (self.height + 2 * self.padding[0], self.width + 2 * self.padding[1])
        if room[0] < reach[0] or room[1] < reach[1]:
            return False
        if self.groups == 1 or self.pattern == "unstructured":
            return True
        found = parse_pattern(self.pattern)
        return self.pattern != "channel" and self.filters // self.groups % found.bk == 0

    def build(self) -> tuple[Tensor, Packed, Tensor | None, Tensor | None]:
        """(x, packed weight, bias, residual), the same at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        weight = torch.randn(self.geometry.weight_shape, generator=generator).to(dtype)
        packed = pack(weight, self._mask(generator), parse_pattern(self.pattern), self.geometry)
        bias = torch.randn(self.filters, generator=generator).to(dtype) if self.has_bias else None
        size = (self.images, self.channels, self.height, self.width)
        x = self._place(torch.randn(size, generator=generator).to(dtype))
        residual = None
        if self.has_residual:
            size = (self.images, self.filters, *self.geometry.output_size(self.height, self.width))
            residual = torch.randn(size, generator=generator).to(getattr(torch, self.out_dtype or self.dtype))
            residual = residual.contiguous(memory_format=torch.channels_last)
        return x, packed, bias, residual

    def _mask(self, generator: torch.Generator) -> Tensor:
        pattern, shape = parse_pattern(self.pattern), self.geometry.weight_shape
        # A mask of channels is the product of a choice of rows and one of columns.
        units_shape = (*shape[:2], 1, 1) if self.pattern == "channel" else pattern.units_shape(shape)
        units = torch.rand(units_shape, generator=generator) < 0.4
        if self.pattern == "channel":
            rows, columns = (torch.rand(n, generator=generator) < 0.6 for n in shape[:2])
            units = (rows[:, None] & columns[None, :])[..., None, None]
        if self.kept in ("none", "one"):
            units = torch.zeros_like(units)
        if self.kept == "one":
            units.view(-1)[self.seed % units.numel()] = True
        if self.kept == "all":
            units = torch.ones_like(units)
        if self.kept == "row":
            units[self.seed % 2 :: 2] = False
        if self.kept == "column":
            units[:, self.seed % 2 :: 2] = False
        if self.pattern == "channel":
            return units.expand(shape).contiguous()
        return pattern.expand(units, shape).contiguous()

    def _place(self, x: Tensor) -> Tensor:
        if self.memory == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.memory == "contiguous":
            return x
        N, C, H, W = x.shape
        around = torch.full((N, H + 3, W + 2, C + 5), float("nan"), dtype=x.dtype)
        return around[:, 1 : H + 1, 2 : W + 2, 3 : C + 3].permute(0, 3, 1, 2).copy_(x)
