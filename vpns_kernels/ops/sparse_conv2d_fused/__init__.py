"""sparse_conv2d_fused: for inference, a packed convolution with bias, residual and activation in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._torch import ACTS
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.registry import call, register_op
from vpns_kernels.ops.sparse_conv2d_fused import compact, cpu, reference

__all__ = ["check_inputs", "sparse_conv2d_fused"]

_OP = register_op(
    "sparse_conv2d_fused",
    {"cpu": cpu, "triton": TritonBackend("sparse_conv2d_fused"), "compact": compact, "reference": reference},
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_conv2d_fused(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    geometry: ConvGeometry,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """act(conv(x) + bias + residual), summed in float32 (float64 for float64) and rounded once.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16, float16 or float64.
        values, layout: from `formats.pack`, in any of those types; float64 goes with float64 only.
        bias: [K] or None.
        residual: [N, K, P, Q] in the output's dtype, any strides, or None.
        act: "none", "relu" or "relu6".
        out_dtype: float32, bfloat16 or float16 (float64 for float64 inputs); x's own by default.
        backend: "cpu", "triton" (blocks and channels on a GPU), "compact" (channels), "reference", or "auto"
            for the first that can.

    Returns:
        [N, K, P, Q], channels_last. NaN or infinity in x reaches only outputs that a kept weight (of block
        weights, a kept block) connects with it, and passes the activation as in torch; only the reference
        lets it through masked weights.

    Raises:
        ValueError, TypeError: arguments that do not fit one another.
        NotImplementedError: the backend asked for cannot run this, or a gradient was asked for: says why.

    Example:
        >>> from vpns_kernels import pack, parse_pattern
        >>> geometry, weight = ConvGeometry(1, 1, (1, 1)), torch.tensor([[[[-2.0]]]])
        >>> packed = pack(weight, weight != 0, parse_pattern("unstructured"), geometry)
        >>> x = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
        >>> sparse_conv2d_fused(x, packed.values, packed.layout, geometry, act="relu").flatten().tolist()
        [0.0, 2.0]
    """
    out_dtype = out_dtype or x.dtype
    check_inputs(x, geometry, bias, residual, act, out_dtype)
    g = geometry
    sizes = (g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
    args = (x, values, list(layout), bias, residual, *sizes, act, out_dtype)
    result: Tensor = call("sparse_conv2d_fused")(*args, _OP.resolve(backend, *args))
    return result


def check_inputs(
    x: Tensor,
    geometry: ConvGeometry,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    out_dtype: torch.dtype,
) -> None:
    """Refuse what no backend takes; sparse layers, which hold prepared weights, ask here too."""
    me = "sparse_conv2d_fused"
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"{me}: expected x [N, {geometry.in_channels}, H, W], got {list(x.shape)}")
    if x.dtype not in (*_DTYPES, torch.float64):
        raise TypeError(f"{me}: expected x in one of {(*_DTYPES, torch.float64)}, got {x.dtype}")
    if out_dtype not in ((torch.float64,) if x.dtype == torch.float64 else _DTYPES):
        raise TypeError(f"{me}: expected out_dtype in {_DTYPES}, or float64 for float64, got {out_dtype}")
    if act not in ACTS:
        raise ValueError(f"{me}: expected act in {ACTS}, got {act!r}")
    if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
        raise ValueError(f"{me}: expected bias [{geometry.out_channels}], got {list(bias.shape)}")
    P, Q = geometry.output_size(x.shape[2], x.shape[3])
    if residual is not None:
        shape = (x.shape[0], geometry.out_channels, P, Q)
        if tuple(residual.shape) != shape:
            raise ValueError(f"{me}: expected residual {list(shape)}, got {list(residual.shape)}")
        if residual.dtype != out_dtype or residual.device != x.device:
            raise TypeError(
                f"{me}: expected residual in {out_dtype} on {x.device}, "
                f"got {residual.dtype} on {residual.device}"
            )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept: there is no backward."""


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "sparse_conv2d_fused: expected inference, got a request for a gradient "
        "(sparse_conv2d is differentiable; or call this one under torch.no_grad())"
    )


torch.library.register_autograd(
    "vpns::sparse_conv2d_fused", _backward, setup_context=_save, lib=schemas.LIBRARY
)
