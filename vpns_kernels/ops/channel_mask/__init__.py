"""channel_mask: each channel of an activation times its mask, with a gradient for the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.channel_mask import cpu, reference
from vpns_kernels.ops.registry import call, check_floating, register_op

__all__ = ["channel_mask"]

_OP = register_op(
    "channel_mask", {"cpu": cpu, "triton": TritonBackend("channel_mask"), "reference": reference}
)


def _dispatch_backward(*args: Any) -> Any:
    *inputs, backend = args
    return _OP.module(backend).run_backward(*inputs)


schemas.LIBRARY.impl("channel_mask_backward", _dispatch_backward, "CompositeExplicitAutograd")


def channel_mask(x: Tensor, scores: Tensor, mask: Tensor, backend: str = "auto") -> Tensor:
    """x · mask over dimension 1; differentiable once in x and, straight through the mask, in scores.

    The gradient of a channel's score is sign(S) · Σ x · dx over the channel, masked channels included.

    Args:
        x: [N, C, ...]; float32, bfloat16, float16 or float64.
        scores: [C], of a floating dtype; only their signs count.
        mask: bool [C], True = kept.
        backend: "cpu", "triton", "reference", or "auto" for the first that can.

    Returns:
        As x; channels_last where x is [N, C, H, W], else contiguous. What is masked is zero times x: NaN or
        infinity in it becomes NaN.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not bool, or scores or x not of a floating dtype.
        NotImplementedError: the backend asked for cannot run this; says why.
    """
    if x.dim() < 2:
        raise ValueError(f"channel_mask: expected x [N, C, ...], got {list(x.shape)}")
    for name, tensor in (("scores", scores), ("mask", mask)):
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"channel_mask: expected {name} [{x.shape[1]}], got {list(tensor.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"channel_mask: expected a bool mask, got {mask.dtype}")
    check_floating("channel_mask", x=x, scores=scores)
    args = (x, scores, mask)
    result: Tensor = call("channel_mask")(*args, _OP.resolve(backend, *args))
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    if torch.is_grad_enabled():
        raise NotImplementedError("channel_mask: expected a first derivative, got a request for the second")
    wants = [bool(wanted) for wanted in ctx.needs_input_grad[:2]]
    found = call("channel_mask_backward")(grad, *ctx.saved_tensors, wants, ctx.backend)
    return found[0] if wants[0] else None, found[1] if wants[1] else None, None, None


torch.library.register_autograd("vpns::channel_mask", _backward, setup_context=_save, lib=schemas.LIBRARY)
