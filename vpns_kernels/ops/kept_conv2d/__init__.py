"""kept_conv2d: a 2-D convolution between activations whose channels are masked: zeros are not multiplied.

In search over channels a mask zeroes channels of what a convolution reads, and the gradients of channels of
what it writes. The masks are of this step, the weight is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.kept_conv2d import compact, reference
from vpns_kernels.ops.kept_conv2d.compact import MOST_KEPT
from vpns_kernels.ops.registry import bias_gradient, call, check_floating, register_op

__all__ = ["MOST_KEPT", "kept_conv2d"]

_OP = register_op(
    "kept_conv2d", {"compact": compact, "triton": TritonBackend("kept_conv2d"), "reference": reference}
)


def _dispatch_backward(
    grad: Tensor, weight: Tensor, output_mask: Tensor | None, x_shape: Sequence[int], *rest: Any
) -> Tensor:
    *sizes, backend = rest
    found: Tensor = _OP.module(backend).run_input_gradient(grad, weight, output_mask, x_shape, *sizes)
    return found


schemas.LIBRARY.impl("kept_conv2d_backward", _dispatch_backward, "CompositeExplicitAutograd")


def kept_conv2d(
    x: Tensor,
    weight: Tensor,
    input_mask: Tensor,
    geometry: ConvGeometry,
    bias: Tensor | None = None,
    output_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve x, whose masked channels are zero; differentiable once in x and bias.

    The gradient of x is that of all its channels: a masked one learns from it and may return.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16, float16 or float64, to which the weight is rounded.
        weight: [K, C / groups, R, S], frozen.
        input_mask: bool [C], True = kept; in the other channels x is zero.
        bias: [K] or None.
        output_mask: bool [K], True = kept; in the other channels the gradient of the result is zero. None
            where none need be.
        backend: "compact" (the smaller dense convolution, on the CPU), "triton" (on a GPU, which counts what
            is kept by itself), "reference", or "auto" for the first that can.

    Returns:
        [N, K, P, Q] in the dtype of x, channels_last. What x has in masked channels is read or not.

    Raises:
        ValueError: shapes that do not fit the geometry, or a weight that wants a gradient.
        TypeError: a mask that is not bool, or x or a weight that is not of a floating dtype.
        NotImplementedError: the backend asked for cannot run this; says why.
    """
    _check(x, weight, input_mask, geometry, bias, output_mask)
    g = geometry
    args = (x, weight, bias, input_mask, output_mask, g.stride, g.padding, g.dilation, g.groups)
    result: Tensor = call("kept_conv2d")(*args, _OP.resolve(backend, *args))
    return result


def _check(
    x: Tensor,
    weight: Tensor,
    input_mask: Tensor,
    geometry: ConvGeometry,
    bias: Tensor | None,
    output_mask: Tensor | None,
) -> None:
    C, K = geometry.in_channels, geometry.out_channels
    if x.dim() != 4 or x.shape[1] != C:
        raise ValueError(f"kept_conv2d: expected x [N, {C}, H, W], got {list(x.shape)}")
    geometry.output_size(x.shape[2], x.shape[3])
    if tuple(weight.shape) != geometry.weight_shape:
        raise ValueError(
            f"kept_conv2d: expected a weight {list(geometry.weight_shape)}, got {list(weight.shape)}"
        )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "kept_conv2d: expected a frozen weight, got one that requires a gradient (detach it)"
        )
    check_floating("kept_conv2d", x=x, weight=weight)
    if bias is not None and tuple(bias.shape) != (K,):
        raise ValueError(f"kept_conv2d: expected bias [{K}], got {list(bias.shape)}")
    for name, mask, count in (("input_mask", input_mask, C), ("output_mask", output_mask, K)):
        if mask is not None and tuple(mask.shape) != (count,):
            raise ValueError(f"kept_conv2d: expected {name} [{count}], got {list(mask.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"kept_conv2d: expected a bool {name}, got {mask.dtype}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, output_mask, *sizes, backend = inputs
    # Not x, which would be kept for its shape alone.
    ctx.save_for_backward(weight, output_mask)
    ctx.x_shape, ctx.sizes, ctx.backend = x.shape, sizes, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("kept_conv2d: expected a first derivative, got a request for the second")
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        args = (grad, *ctx.saved_tensors, ctx.x_shape, *ctx.sizes, ctx.backend)
        grad_x = call("kept_conv2d_backward")(*args)
    if ctx.needs_input_grad[2]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, grad_bias, *(None,) * 7


torch.library.register_autograd("vpns::kept_conv2d", _backward, setup_context=_save, lib=schemas.LIBRARY)
