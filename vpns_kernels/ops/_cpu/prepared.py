"""How does a packed convolution run natively? Prepared once per input shape, then by a kernel of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.geometry import ConvGeometry

# In names of kernels that multiply pairs of bfloat16 numbers.
_PAIRS = ("bf16", "amx")
# Asked once: a graph that torch.compile traces cannot call the library.
_HAS_CHANNEL_KERNEL = native.why_not() is None and any(
    name.startswith("channel_") for name in native.library().sparse_conv2d_kernels()
)


def why_not(x: Tensor, values: Tensor, kernel: str = "") -> str | None:
    """CPU tensors of one of the float types, and the compiled library.

    Channel weights in double precision, and all of them where only the scalar loop takes them, are refused
    unless that kernel is named: as a smaller dense convolution they run faster.
    """
    if x.device.type != "cpu" or values.device.type != "cpu":
        return f"it takes CPU tensors, got {x.device} and {values.device}"
    if x.dtype not in DTYPE_NAMES or values.dtype not in DTYPE_NAMES:
        return f"it takes {', '.join(DTYPE_NAMES.values())}, got {x.dtype} and {values.dtype}"
    if (x.dtype == torch.float64) != (values.dtype == torch.float64):
        return f"it takes float64 with float64 only, got {x.dtype} and {values.dtype}"
    if values.dim() == 4 and not kernel and (x.dtype == torch.float64 or not _HAS_CHANNEL_KERNEL):
        return "for these channel weights it has the scalar kernel only; they run as a smaller dense layer"
    return native.why_not()


def multiplied_dtype(weight: torch.dtype, x: torch.dtype, is_single: bool, kernel: str = "") -> torch.dtype:
    """The type in which packed weights meet an input: their own, but for blocks and channels in float32.

    Those a bfloat16 input multiplies in bfloat16, at twice the rate or more, where this CPU (or the named
    kernel) does: autocast rounds dense weights likewise, and search what its masks keep.

    Args:
        is_single: of unstructured weights, which are multiplied in float32.
    """
    if is_single or (weight, x) != (torch.float32, torch.bfloat16):
        return weight
    if kernel:
        return x if any(name in kernel for name in _PAIRS) else weight
    return x if any(map(native.has_isa, ("avx512_bf16", "amx"))) else weight


def describe(
    values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, x_shape: Sequence[int]
) -> tuple[list[int], Any, tuple[Tensor, ...]]:
    """A layer's sizes and its weight as the library takes them, and the tensors that must outlive these."""
    images, _, height, width = x_shape
    K, _, R, S = geometry.weight_shape
    sizes = [images, geometry.in_channels, height, width, K, R, S, *geometry.output_size(height, width)]
    sizes += [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]
    values = values.detach().contiguous()
    first, second = layout[0].contiguous(), layout[1].contiguous()
    weights = native.library().Weights(
        values.data_ptr(),
        DTYPE_NAMES[values.dtype],
        first.data_ptr(),
        second.data_ptr(),
        list(values.shape),
        torch.get_num_threads(),
    )
    return sizes, weights, (values, first, second)


_Form = TypeVar("_Form")


def refill(form: _Form, values: Tensor) -> _Form | None:
    """A prepared form with other values in its handle; None where its kernel must be prepared anew."""
    other: Any = copy(form)
    values = values.detach().to(other.weight_dtype).contiguous()
    weights = native.library().Weights(values.data_ptr(), DTYPE_NAMES[values.dtype], 0, 0, list(values.shape))
    other._handle = other._handle.refilled(weights, torch.get_num_threads())
    return None if other._handle is None else other


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
        K = geometry.out_channels
        self.output_shape = (images, K, P, Q)
        self._x_shape, self._x_dtype = tuple(x_shape), x_dtype
        self._compute_dtype = values.dtype if values.dtype == torch.float64 else torch.float32
        self.weight_dtype = multiplied_dtype(values.dtype, x_dtype, values.dim() == 1, kernel)
        values = values.to(self.weight_dtype)
        sizes, weights, _alive = describe(values, layout, geometry, x_shape)
        library = native.library()
        self.kernel: str = library.sparse_conv2d_choose(sizes, weights, DTYPE_NAMES[x_dtype], kernel)
        self._handle: Any = library.sparse_conv2d_prepare(sizes, weights, DTYPE_NAMES[x_dtype], kernel)

    def refilled(self, values: Tensor) -> Self | None:
        """The same with other values of the same layout; None where only preparing them helps."""
        return refill(self, values)

    def run(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        act: str = "none",
        out_dtype: torch.dtype | None = None,
        phases: Tensor | None = None,
    ) -> Tensor:
        """[N, C, H, W] of the prepared shape → act(conv(x) + bias + residual) [N, K, P, Q], channels_last.

        Args:
            phases: three doubles to which kernels that keep count add the seconds of laying out the input, of
                products and of stores.
        """
        if tuple(x.shape) != self._x_shape or x.dtype != self._x_dtype:
            raise ValueError(
                f"sparse_conv2d: expected x {self._x_shape} {self._x_dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        y = torch.empty(
            self.output_shape, dtype=out_dtype or x.dtype, device="cpu", memory_format=torch.channels_last
        )
        if (y.dtype == torch.float64) != (x.dtype == torch.float64):
            raise ValueError(
                f"sparse_conv2d: expected float64 with float64 only, got {x.dtype} and {y.dtype}"
            )
        if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
            raise ValueError(
                f"sparse_conv2d: expected a residual {list(y.shape)} {y.dtype}, "
                f"got {list(residual.shape)} {residual.dtype}"
            )
        if y.numel() == 0:
            return y
        # Channels must lie side by side; images, rows and columns may have any stride.
        if x.shape[1] > 1 and x.stride(1) != 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if bias is not None:
            bias = bias.detach().to(self._compute_dtype).contiguous()
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        self._handle.run(
            x.data_ptr(),
            DTYPE_NAMES[x.dtype],
            x.stride(0),
            x.stride(2),
            x.stride(3),
            y.data_ptr(),
            DTYPE_NAMES[y.dtype],
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            act,
            torch.get_num_threads(),
            0 if phases is None else phases.data_ptr(),
        )
        return y
