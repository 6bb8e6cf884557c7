"""CPU backend: csrc/cpu/sparse_conv2d_*.cpp, one kernel per format and instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.formats import validate
from vpns_kernels.geometry import ConvGeometry, Pair

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """Unstructured and block weights, CPU tensors, and the compiled library."""
    if x.device.type != "cpu" or values.device.type != "cpu":
        return f"it takes CPU tensors, got {x.device}"
    if values.dim() not in (1, 3):
        return "it takes unstructured and block weights; channel-pruned layers run as smaller dense ones"
    if x.dtype not in _NAMES or values.dtype not in _NAMES:
        return f"it takes float32, bfloat16 and float64, got {x.dtype} and {values.dtype}"
    if (x.dtype == torch.float64) != (values.dtype == torch.float64):
        return f"it takes float64 with float64 only, got {x.dtype} and {values.dtype}"
    return native.why_not()


class Prepared:
    """A packed weight in the order of the kernel that will run it, for one input shape and dtype.

    Immutable; any number of threads may call `run` at once.
    """

    def __init__(
        self,
        values: Tensor,
        layout: Sequence[Tensor],
        geometry: ConvGeometry,
        x_shape: Sequence[int],
        x_dtype: torch.dtype,
        kernel: str = "",
    ) -> None:
        images, _, height, width = x_shape
        P, Q = geometry.output_size(height, width)
        K, _, R, S = geometry.weight_shape
        self.output_shape = (images, K, P, Q)
        self._x_shape, self._x_dtype = tuple(x_shape), x_dtype
        self._compute_dtype = values.dtype if values.dtype == torch.float64 else torch.float32
        sizes = [images, geometry.in_channels, height, width, K, R, S, P, Q]
        sizes += [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]
        values = values.detach().contiguous()
        indptr, index = layout[0].contiguous(), layout[1].contiguous()
        library = native.library()
        weights = library.Weights(
            values.data_ptr(),
            _NAMES[values.dtype],
            indptr.data_ptr(),
            index.data_ptr(),
            list(values.shape),
        )
        self.kernel: str = library.sparse_conv2d_choose(sizes, weights, _NAMES[x_dtype], kernel)
        self._handle: Any = library.sparse_conv2d_prepare(sizes, weights, _NAMES[x_dtype], kernel)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[N, C, H, W] of the prepared shape → [N, K, P, Q], channels_last."""
        if tuple(x.shape) != self._x_shape or x.dtype != self._x_dtype:
            raise ValueError(
                f"sparse_conv2d: expected x {self._x_shape} {self._x_dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        y = torch.empty(self.output_shape, dtype=x.dtype, memory_format=torch.channels_last)
        if y.numel() == 0:
            return y
        # Channels must lie side by side; images, rows and columns may have any stride.
        if x.shape[1] > 1 and x.stride(1) != 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if bias is not None:
            bias = bias.detach().to(self._compute_dtype).contiguous()
        self._handle.run(
            x.data_ptr(),
            _NAMES[x.dtype],
            x.stride(0),
            x.stride(2),
            x.stride(3),
            y.data_ptr(),
            _NAMES[y.dtype],
            0 if bias is None else bias.data_ptr(),
            0,
            "none",
            torch.get_num_threads(),
        )
        return y


def run(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    K, C, R, S = weight_shape
    geometry = ConvGeometry(C * groups, K, (R, S), stride, padding, dilation, groups)
    validate(values, layout, geometry)
    return Prepared(values, layout, geometry, x.shape, x.dtype).run(x, bias)
