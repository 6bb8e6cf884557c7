"""What sizes does a convolution or a visual prompt have?

The letters of the field, used everywhere: images N, input channels C, input height and width H W, output
channels K, filter height and width R S, output height and width P Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one 2-D convolution; a linear layer is the 1×1 case."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "padding", "dilation"):
            # torch hands ops their sizes as lists.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("in_channels", "out_channels", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"ConvGeometry: expected {name} >= 1, got {getattr(self, name)}")
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise ValueError(f"ConvGeometry: expected {name} of two ints >= {least}, got {pair}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"ConvGeometry: expected channels divisible by groups={self.groups}, "
                f"got in_channels={self.in_channels}, out_channels={self.out_channels}"
            )

    @classmethod
    def from_module(cls, module: nn.Conv2d | nn.Linear) -> ConvGeometry:
        """The geometry of a torch layer; refuses padding modes other than zeros and uneven "same" padding."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, (1, 1))
        if module.padding_mode != "zeros":
            raise NotImplementedError(
                f"ConvGeometry.from_module: expected padding_mode 'zeros', got {module.padding_mode!r}"
            )
        pairs = (module.kernel_size, module.stride, _numeric_padding(module), module.dilation)
        kernel_size, stride, padding, dilation = ((int(a), int(b)) for a, b in pairs)
        return cls(
            module.in_channels, module.out_channels, kernel_size, stride, padding, dilation, module.groups
        )

    @classmethod
    def from_weight(
        cls,
        weight_shape: Sequence[int],
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> ConvGeometry:
        """The geometry of a weight [K, C / groups, R, S] and of the sizes that ops are handed beside it."""
        K, C, R, S = weight_shape
        return cls(C * groups, K, (R, S), stride, padding, dilation, groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C / groups, R, S]."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def describe(self, size: Pair | None) -> str:
        """For people: channels, filter, what differs from the plain case, and the input's H, W.

        Args:
            size: None of a linear layer.
        """
        channels = f"{self.in_channels}→{self.out_channels}"
        if size is None:
            return f"{channels} linear"
        down, across = self.stride
        strides = "" if self.stride == (1, 1) else f" /{down}" if down == across else f" /{down}x{across}"
        groups = "" if self.groups == 1 else f" in {self.groups} groups"
        filters = f"{self.kernel_size[0]}x{self.kernel_size[1]}"
        return f"{channels} {filters}{strides}{groups} @{size[0]}x{size[1]}"

    def output_size(self, height: int, width: int) -> Pair:
        """Output P, Q for an input of H, W pixels; ValueError where the filter does not fit the input."""
        size = []
        for axis, extent in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            padded = extent + 2 * self.padding[axis]
            if padded < reach:
                raise ValueError(
                    f"ConvGeometry.output_size: expected at least {reach} pixels with padding, got {padded}"
                )
            size.append((padded - reach) // self.stride[axis] + 1)
        return size[0], size[1]

    def flops(self, images: int, height: int, width: int) -> int:
        """Multiplications and additions of the dense layer, counted as two operations."""
        P, Q = self.output_size(height, width)
        K, C, R, S = self.weight_shape
        return 2 * images * P * Q * K * C * R * S


def _numeric_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return tuple(int(amount) for amount in conv.padding)
    totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise NotImplementedError(
            f"ConvGeometry.from_module: expected as much padding on both sides, got padding='same' of kernel "
            f"{conv.kernel_size} with dilation {conv.dilation}"
        )
    return tuple(total // 2 for total in totals)


@dataclass(frozen=True)
class PromptGeometry:
    """A square canvas whose outermost `frame` pixels carry the visual prompt (paper figure 2)."""

    canvas: int
    frame: int

    def __post_init__(self) -> None:
        if self.canvas < 1:
            raise ValueError(f"PromptGeometry: expected canvas >= 1 pixel, got {self.canvas}")
        if self.frame < 0 or 2 * self.frame >= self.canvas:
            raise ValueError(
                f"PromptGeometry: expected 0 <= 2 * frame < canvas={self.canvas}, got frame={self.frame} "
                "(the frame must leave room for the image)"
            )

    @property
    def inside(self) -> int:
        """Side of the image inside the frame, in pixels."""
        return self.canvas - 2 * self.frame

    def frame_mask(self) -> Tensor:
        """Bool [canvas, canvas], True on the frame."""
        mask = torch.ones(self.canvas, self.canvas, dtype=torch.bool)
        inner = slice(self.frame, self.frame + self.inside)
        mask[inner, inner] = False
        return mask
