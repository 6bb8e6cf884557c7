"""How do the gradients of a packed convolution run natively?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._cpu.prepared import _NAMES as DTYPE_NAMES


def input_gradient(
    grad: Tensor, x_shape: Sequence[int], values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """[N, K, P, Q] → [N, C, H, W] as grad, channels_last: the forward kernels, on the transposed weight."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x = torch.empty(tuple(x_shape), dtype=grad.dtype, memory_format=torch.channels_last)
    if grad_x.numel() == 0:
        return grad_x
    sizes, weights = _describe(x_shape, values, layout, geometry)
    name = DTYPE_NAMES[grad.dtype]
    handle = native.library().sparse_conv2d_prepare_input_gradient(sizes, weights, name)
    _, K, P, Q = grad.shape
    # Strides of a size of one are anybody's: state those of the dense layout.
    strides = (K * P * Q, K * Q, K)
    handle.run(
        grad.data_ptr(), name, *strides, grad_x.data_ptr(), name, 0, 0, "none", torch.get_num_threads()
    )
    return grad_x


def why_no_weight_gradient(x: Tensor, values: Tensor) -> str | None:
    """Unstructured and block weights, in anything but double precision, on a CPU with AVX2."""
    if values.dim() == 4:
        return "it takes unstructured and block weights"
    if x.dtype == torch.float64:
        return "it computes in float32"
    return None if native.has_isa("avx2") else "it needs avx2"


def weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """Of the kept weights (of block weights, the kept blocks) only: float32, in their packed order."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(values.shape, dtype=torch.float32)
    if grad.numel() == 0 or out.numel() == 0:
        return out.zero_()
    sizes, weights = _describe(x.shape, values, layout, geometry)
    handle = native.library().sparse_conv2d_prepare_weight_gradient(sizes, weights)
    _, C, H, W = x.shape
    strides = (C * H * W, C * W, C)
    name = DTYPE_NAMES[x.dtype]
    handle.run(x.data_ptr(), name, *strides, grad.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def _describe(
    x_shape: Sequence[int], values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> tuple[list[int], Any]:
    """The sizes and the forward weight, as the library takes them; they must outlive the call."""
    images, channels, height, width = x_shape
    K, _, R, S = geometry.weight_shape
    sizes = [images, channels, height, width, K, R, S, *geometry.output_size(height, width)]
    sizes += [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]
    first, second = layout[0], layout[1]
    weights = native.library().Weights(
        values.data_ptr(), DTYPE_NAMES[values.dtype], first.data_ptr(), second.data_ptr(), list(values.shape)
    )
    return sizes, weights
