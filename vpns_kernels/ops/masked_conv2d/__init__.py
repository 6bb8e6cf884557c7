"""masked_conv2d: a 2-D convolution whose mask is being learned; masked_linear is its 1×1 case.

The weight is dense and frozen, the mask changes at every step. The scores get the straight-through gradient
sign(S) · Σ_unit W · dW, masked units too, so that they can return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.masked_conv2d import cpu, reference
from vpns_kernels.ops.registry import bias_gradient, call, check_floating, register_op
from vpns_kernels.patterns import Pattern

__all__ = ["masked_conv2d", "masked_linear"]

_OP = register_op(
    "masked_conv2d", {"cpu": cpu, "triton": TritonBackend("masked_conv2d"), "reference": reference}
)


def _dispatch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, scores: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Each gradient by the backend of its pass; empty where it is not wanted."""
    *sizes, wants, (_, of_input, of_scores) = rest
    args = (grad.to(x.dtype), x, weight, mask, scores, *sizes)
    grad_x = _OP.module(of_input).run_input_gradient(*args) if wants[0] else x.new_empty(0)
    grad_scores = _OP.module(of_scores).run_score_gradient(*args) if wants[1] else scores.new_empty(0)
    return grad_x, grad_scores


schemas.LIBRARY.impl("masked_conv2d_backward", _dispatch_backward, "CompositeExplicitAutograd")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    geometry: ConvGeometry,
    pattern: Pattern,
    bias: Tensor | None = None,
    backend: str | Sequence[str] = "auto",
) -> Tensor:
    """Convolve with weight · mask; differentiable once in x, scores and bias.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16, float16 or float64, to which the weight is rounded.
        weight: [K, C / groups, R, S], frozen.
        mask: bool, one entry per unit of the pattern (`pattern.units_shape(weight.shape)`), True = kept.
        scores: as mask, of a floating dtype; only their signs count.
        bias: [K] or None.
        backend: "cpu", "triton" (masks of blocks and channels on a GPU), "reference", or "auto" for the first
            that can; one for all passes, or three: of forward, of the gradient of x, of that of the scores.

    Returns:
        [N, K, P, Q] in the dtype of x, channels_last. Where the weight is finite, NaN or infinity in x
        reaches only outputs that a kept weight (of block masks, a kept block) connects with it; only the
        reference lets it through masked weights.

    Raises:
        ValueError: shapes that do not fit the geometry or the pattern, or a weight that wants a gradient.
        TypeError: a mask that is not bool; x, scores or a weight that are not of a floating dtype.
        NotImplementedError: the backend asked for cannot run this; says why.
    """
    _check("masked_conv2d", weight, mask, scores, geometry, pattern, bias)
    check_floating("masked_conv2d", x=x, scores=scores, weight=weight)
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"masked_conv2d: expected x [N, {geometry.in_channels}, H, W], got {list(x.shape)}")
    geometry.output_size(x.shape[2], x.shape[3])
    g = geometry
    args = (x, weight, mask, scores, bias, pattern.spec, g.stride, g.padding, g.dilation, g.groups)
    may_learn = torch.is_grad_enabled()
    wants = (True, may_learn and x.requires_grad, may_learn and scores.requires_grad)
    result: Tensor = call("masked_conv2d")(*args, _OP.resolve_passes(backend, *args, wants=wants))
    return result


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    backend: str | Sequence[str] = "auto",
) -> Tensor:
    """x · (weight · mask)ᵀ + bias: [..., C] → [..., K]; everything else as in masked_conv2d.

    Args:
        weight: [K, C], frozen.
        mask, scores: as `pattern.units_shape((K, C))`.
    """
    if weight.dim() != 2:
        raise ValueError(f"masked_linear: expected a weight [K, C], got {list(weight.shape)}")
    K, C = weight.shape
    if x.dim() == 0 or x.shape[-1] != C:
        raise ValueError(f"masked_linear: expected x [..., {C}], got {list(x.shape)}")
    units = pattern.units_shape((K, C))
    for name, tensor in (("mask", mask), ("scores", scores)):
        if tuple(tensor.shape) != units:
            raise ValueError(f"masked_linear: expected {name} {list(units)}, got {list(tensor.shape)}")
    image_units = pattern.units_shape((K, C, 1, 1))
    y = masked_conv2d(
        x.reshape(-1, C, 1, 1),
        weight.view(K, C, 1, 1),
        mask.reshape(image_units),
        scores.reshape(image_units),
        ConvGeometry(C, K, (1, 1)),
        pattern,
        bias,
        backend,
    )
    return y.reshape(*x.shape[:-1], K)


def _check(
    op: str,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    geometry: ConvGeometry,
    pattern: Pattern,
    bias: Tensor | None,
) -> None:
    if tuple(weight.shape) != geometry.weight_shape:
        raise ValueError(f"{op}: expected a weight {list(geometry.weight_shape)}, got {list(weight.shape)}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(f"{op}: expected a frozen weight, got one that requires a gradient (detach it)")
    units = pattern.units_shape(geometry.weight_shape)
    for name, tensor in (("mask", mask), ("scores", scores)):
        if tuple(tensor.shape) != units:
            raise ValueError(
                f"{op}: expected {name} {list(units)} of pattern {pattern.spec!r}, got {list(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: expected a bool mask, got {mask.dtype}")
    if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
        raise ValueError(f"{op}: expected bias [{geometry.out_channels}], got {list(bias.shape)}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, scores, bias, *rest, backends = inputs
    ctx.save_for_backward(x, weight, mask, scores)
    ctx.rest, ctx.backends = rest, backends
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("masked_conv2d: expected a first derivative, got a request for the second")
    grad_x = grad_scores = grad_bias = None
    wants = [bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[3])]
    if any(wants):
        found = call("masked_conv2d_backward")(grad, *ctx.saved_tensors, *ctx.rest, wants, ctx.backends)
        grad_x, grad_scores = found[0] if wants[0] else None, found[1] if wants[1] else None
    if ctx.needs_input_grad[4]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, None, grad_scores, grad_bias, *(None,) * 6


torch.library.register_autograd("vpns::masked_conv2d", _backward, setup_context=_save, lib=schemas.LIBRARY)
