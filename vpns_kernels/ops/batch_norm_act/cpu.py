"""CPU backend: csrc/cpu/batch_norm_act.*, two passes over the activations each way."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, act: str
) -> str | None:
    """float32 and half activations with float32 weights, on a CPU with AVX2."""
    if x.device.type != "cpu":
        return f"it takes CPU tensors, got {x.device}"
    if x.dtype not in _DTYPES or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        return f"it takes float32 or halves with float32 weights, got {x.dtype} with {weight.dtype}"
    if native.why_not() is None and not native.has_isa("avx2"):
        return "it needs avx2"
    return native.why_not()


def run(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else _dense(residual)
    y = torch.empty_like(x)
    mean, variance = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    native.library().batch_norm_act(
        DTYPE_NAMES[x.dtype],
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        x.numel() // x.shape[1],
        x.shape[1],
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        mean.data_ptr(),
        variance.data_ptr(),
        act,
        torch.get_num_threads(),
    )
    return y, mean, variance


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    act: str,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, y, weight = _dense(grad.to(x.dtype)), _dense(x), _dense(y), weight.contiguous()
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    grad_weight, grad_bias = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    native.library().batch_norm_act_backward(
        DTYPE_NAMES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        grad_x.data_ptr(),
        grad_residual.data_ptr() if has_residual else 0,
        x.numel() // x.shape[1],
        x.shape[1],
        weight.data_ptr(),
        bias.contiguous().data_ptr(),
        mean.data_ptr(),
        variance.data_ptr(),
        eps,
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        act,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias, grad_residual


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
