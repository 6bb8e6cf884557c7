"""batch_norm_act: training-mode batch norm, residual add and activation in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.batch_norm_act import cpu, reference
from vpns_kernels.ops.registry import call, check_floating, register_op

__all__ = ["batch_norm_act"]

ACTIVATIONS = ("none", "relu", "relu6")
_OP = register_op(
    "batch_norm_act", {"cpu": cpu, "triton": TritonBackend("batch_norm_act"), "reference": reference}
)


def _dispatch_backward(*args: Any) -> Any:
    *inputs, backend = args
    return _OP.module(backend).run_backward(*inputs)


schemas.LIBRARY.impl("batch_norm_act_backward", _dispatch_backward, "CompositeExplicitAutograd")


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(variance + eps) · weight + bias + residual), by the batch's own statistics.

    Differentiable once in x, weight, bias and residual.

    Args:
        x: [N, C, H, W]; float32, bfloat16 or float16 (float64 by the reference).
        weight, bias: [C], float32 (float64 with float64 x).
        residual: as x, or None.
        act: "none", "relu" or "relu6".

    Returns:
        y as x, channels_last; mean and variance [C] of the batch (variance divided by N · H · W), without
        gradient: running statistics are the caller's.

    Raises:
        ValueError: shapes or dtypes that do not fit, fewer than two values per channel, or an eps that is not
            positive.
        TypeError: x that is not of a floating dtype.
        NotImplementedError: the backend asked for cannot run this; says why.
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act: expected x [N, C, H, W], got {list(x.shape)}")
    check_floating("batch_norm_act", x=x)
    channels = x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"batch_norm_act: expected {name} [{channels}], got {list(tensor.shape)}")
        if tensor.dtype != wide:
            raise ValueError(f"batch_norm_act: expected {name} {wide} for x {x.dtype}, got {tensor.dtype}")
    if not eps > 0:
        raise ValueError(f"batch_norm_act: expected eps above 0, got {eps}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm_act: expected residual {list(x.shape)} {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}"
        )
    if act not in ACTIVATIONS:
        raise ValueError(f"batch_norm_act: expected act in {ACTIVATIONS}, got {act!r}")
    if x.numel() // max(channels, 1) < 2:
        raise ValueError(f"batch_norm_act: expected at least two values per channel, got {list(x.shape)}")
    args = (x, weight, bias, eps, residual, act)
    result: tuple[Tensor, Tensor, Tensor] = call("batch_norm_act")(*args, _OP.resolve(backend, *args))
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, eps, residual, act, backend = inputs
    y, mean, variance = output
    # Without an activation y is not read again, and what follows may write over it.
    ctx.save_for_backward(x, weight, bias, x if act == "none" else y, mean, variance)
    ctx.settings = (eps, act, residual is not None, backend)
    ctx.mark_non_differentiable(mean, variance)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("batch_norm_act: expected a first derivative, got a request for the second")
    x, weight, bias, y, mean, variance = ctx.saved_tensors
    eps, act, has_residual, backend = ctx.settings
    grad_x, grad_weight, grad_bias, grad_residual = call("batch_norm_act_backward")(
        grad, x, weight, bias, y, mean, variance, eps, act, has_residual, backend
    )
    return grad_x, grad_weight, grad_bias, None, grad_residual if has_residual else None, None, None


torch.library.register_autograd("vpns::batch_norm_act", _backward, setup_context=_save, lib=schemas.LIBRARY)
