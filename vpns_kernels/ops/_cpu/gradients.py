"""How do the gradients of a packed convolution run natively? Prepared once per layout and input shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._cpu.prepared import describe, multiplied_dtype, refill


def why_no_weight_gradient(x: Tensor, values: Tensor) -> str | None:
    """Unstructured and block weights, in anything but double precision, on a CPU with AVX2."""
    if values.dim() == 4:
        return "it takes unstructured and block weights"
    if x.dtype == torch.float64:
        return "it computes in float32"
    return None if native.has_isa("avx2") else "it needs avx2"


class InputGradient:
    """The transposed weight in the order of the kernel that convolves the output's gradient with it.

    Immutable; any number of threads may call `run` at once.
    """

    def __init__(
        self,
        values: Tensor,
        layout: Sequence[Tensor],
        geometry: ConvGeometry,
        x_shape: Sequence[int],
        dtype: torch.dtype,
        kernel: str = "",
    ) -> None:
        self._x_shape = tuple(x_shape)
        self.weight_dtype = multiplied_dtype(values.dtype, dtype, values.dim() == 1, kernel)
        sizes, weights, _alive = describe(values.to(self.weight_dtype), layout, geometry, x_shape)
        library = native.library()
        self._handle: Any = library.sparse_conv2d_prepare_input_gradient(
            sizes, weights, DTYPE_NAMES[dtype], kernel
        )

    def refilled(self, values: Tensor) -> Self | None:
        """The same with other values of the same layout."""
        return refill(self, values)

    def run(self, grad: Tensor) -> Tensor:
        """[N, K, P, Q] → [N, C, H, W] as grad, channels_last."""
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty(self._x_shape, dtype=grad.dtype, device="cpu", memory_format=torch.channels_last)
        if grad_x.numel() == 0:
            return grad_x
        _, K, P, Q = grad.shape
        name = DTYPE_NAMES[grad.dtype]
        # Strides of a size of one are anybody's: state those of the dense layout.
        strides = (K * P * Q, K * Q, K)
        self._handle.run(
            grad.data_ptr(), name, *strides, grad_x.data_ptr(), name, 0, 0, "none", torch.get_num_threads()
        )
        return grad_x


class WeightGradient:
    """Where kept weights read in the input and in the output's gradient; the same for any values."""

    def __init__(
        self,
        values: Tensor,
        layout: Sequence[Tensor],
        geometry: ConvGeometry,
        x_shape: Sequence[int],
        dtype: torch.dtype,
        kernel: str = "",
    ) -> None:
        self._sizes = values.shape
        sizes, weights, _alive = describe(values, layout, geometry, x_shape)
        self._handle: Any = native.library().sparse_conv2d_prepare_weight_gradient(sizes, weights, kernel)

    def refilled(self, values: Tensor) -> Self:
        """Itself: values do not matter."""
        return self

    def run(self, grad: Tensor, x: Tensor) -> Tensor:
        """[N, K, P, Q] and [N, C, H, W] → float32 of the values' shape."""
        grad = grad.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty(self._sizes, dtype=torch.float32, device="cpu")
        if grad.numel() == 0 or out.numel() == 0:
            return out.zero_()
        _, C, H, W = x.shape
        strides = (C * H * W, C * W, C)
        name = DTYPE_NAMES[x.dtype]
        self._handle.run(
            x.data_ptr(), name, *strides, grad.data_ptr(), out.data_ptr(), torch.get_num_threads()
        )
        return out
