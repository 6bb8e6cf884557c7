"""What runs a sparse layer without gradients? The kernel that was named, or the one that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.choose import choose, query_of, this_machine
from vpns_kernels.formats import unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops import _cpu
from vpns_kernels.ops._torch import convolve_compact, finish


class Runner(Protocol):
    """Weights in the form that their kernel reads, for one input shape and dtype; threads may share it."""

    kernel: str

    def run(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, act: str = "none"
    ) -> Tensor:
        """act(conv(x) + bias + residual)."""


def prepare(
    values: Tensor,
    layout: Sequence[Tensor],
    geometry: ConvGeometry,
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    kernel: str = "",
) -> Runner:
    """Prepare packed weights for inputs [N, C, H, W] of this shape and dtype.

    Args:
        kernel: name of a native kernel; "dense" or "compact" for torch; "sparse" for the sparse kernel that
            is expected to be fastest; empty for the fastest of all, dense included.
    """
    if kernel in ("", "sparse"):
        query = query_of(geometry, x_shape, values, x_dtype)
        kernel = choose(query, this_machine(), may_be_dense=kernel == "").kernel
    if kernel == "dense":
        return _Dense(values, layout, geometry, x_shape, x_dtype)
    if kernel == "compact":
        return _Compact(values, layout, geometry)
    return _cpu.Prepared(values, layout, geometry, x_shape, x_dtype, kernel)


class _Dense:
    """torch's own convolution over the weight with zeros in place.

    NaN and infinity of an input spread through those zeros, as in any dense layer.
    """

    kernel = "dense"

    def __init__(
        self,
        values: Tensor,
        layout: Sequence[Tensor],
        geometry: ConvGeometry,
        x_shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        weight = unpack(values.detach(), layout, geometry).to(dtype)
        self._geometry = g = geometry
        # A matrix product, as in nn.Linear.
        one_pixel = g.kernel_size == (1, 1) and tuple(x_shape[2:]) == (1, 1) and g.padding == (0, 0)
        self._is_linear = one_pixel and g.groups == 1
        self._weight = (
            weight.flatten(1) if self._is_linear else weight.contiguous(memory_format=torch.channels_last)
        )

    def run(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, act: str = "none"
    ) -> Tensor:
        bias = None if bias is None else bias.detach().to(x.dtype)
        if self._is_linear:
            y = F.linear(x.flatten(1), self._weight, bias)
            y = y.view(*y.shape, 1, 1)
        else:
            g = self._geometry
            y = F.conv2d(x, self._weight, bias, g.stride, g.padding, g.dilation, g.groups)
        return finish(y, residual, act, x.dtype, in_place=True)


class _Compact:
    """Channel weights as the smaller dense convolution that they are, by torch."""

    kernel = "compact"

    def __init__(self, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> None:
        self._values, self._layout, self._geometry = values.detach(), tuple(layout), geometry

    def run(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, act: str = "none"
    ) -> Tensor:
        y = convolve_compact(x, self._values, self._layout, bias, self._geometry)
        return finish(y, residual, act, x.dtype)
