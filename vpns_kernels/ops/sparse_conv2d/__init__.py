"""sparse_conv2d: a 2-D convolution whose weight is packed, whatever its pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.registry import bias_gradient, call, check_floating, register_op
from vpns_kernels.ops.sparse_conv2d import compact, cpu, reference

__all__ = ["sparse_conv2d"]

_OP = register_op(
    "sparse_conv2d",
    {"cpu": cpu, "triton": TritonBackend("sparse_conv2d"), "compact": compact, "reference": reference},
)


def _dispatch_backward(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    """Each gradient by the backend of its pass; empty where it is not wanted."""
    *sizes, wants, (_, of_input, of_weight) = rest
    args = (grad.to(x.dtype), x, values, layout, *sizes)
    grad_x = _OP.module(of_input).run_input_gradient(*args) if wants[0] else x.new_empty(0)
    grad_values = _OP.module(of_weight).run_weight_gradient(*args) if wants[1] else values.new_empty(0)
    return grad_x, grad_values


schemas.LIBRARY.impl("sparse_conv2d_backward", _dispatch_backward, "CompositeExplicitAutograd")


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    geometry: ConvGeometry,
    bias: Tensor | None = None,
    backend: str | Sequence[str] = "auto",
) -> Tensor:
    """Convolve with a packed weight; differentiable once in x, values and bias.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16, float16 or float64.
        values, layout: from `formats.pack`, in any of those types; float64 goes with float64 only. Blocks and
            channels in float32 are rounded to bfloat16 for a bfloat16 x where this CPU multiplies that, as
            autocast rounds dense weights; their gradient is float32.
        bias: [K] in the dtype of the values, or None.
        backend: "cpu", "triton" (blocks and channels on a GPU), "compact" (channels), "reference", or "auto"
            for the first that can; one for all passes, or three: of forward, of the gradient of x, of that of
            the values.

    Returns:
        [N, K, P, Q] in the dtype of x, channels_last. NaN or infinity in x reaches only outputs that a kept
        weight (of block weights, a kept block) connects with it; only the reference lets it through masked
        weights.

    Raises:
        ValueError: shapes that do not fit the geometry, or a layout that does not describe it.
        TypeError: x or values that are not of a floating dtype.
        NotImplementedError: the backend asked for cannot run this; says why.
    """
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"sparse_conv2d: expected x [N, {geometry.in_channels}, H, W], got {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
        raise ValueError(f"sparse_conv2d: expected bias [{geometry.out_channels}], got {list(bias.shape)}")
    check_floating("sparse_conv2d", x=x, values=values)
    geometry.output_size(x.shape[2], x.shape[3])
    g = geometry
    args = (x, values, list(layout), bias, g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
    may_learn = torch.is_grad_enabled()
    wants = (True, may_learn and x.requires_grad, may_learn and values.requires_grad)
    result: Tensor = call("sparse_conv2d")(*args, _OP.resolve_passes(backend, *args, wants=wants))
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, layout, bias, *geometry, backends = inputs
    ctx.save_for_backward(x, values, *layout)
    ctx.geometry, ctx.backends = geometry, backends
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("sparse_conv2d: expected a first derivative, got a request for the second")
    x, values, *layout = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    wants = [bool(wanted) for wanted in ctx.needs_input_grad[:2]]
    if any(wants):
        args = (grad, x, values, layout, *ctx.geometry, wants, ctx.backends)
        found_x, found_values = call("sparse_conv2d_backward")(*args)
        grad_x, grad_values = found_x if wants[0] else None, found_values if wants[1] else None
    if ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, grad_values, [None] * len(layout), grad_bias, *(None,) * 6


torch.library.register_autograd("vpns::sparse_conv2d", _backward, setup_context=_save, lib=schemas.LIBRARY)
