"""CPU backend: csrc/cpu/channel_mask.*, one pass over the activation each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES, dtype_name

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor, scores: Tensor, mask: Tensor) -> str | None:
    """float32 and half activations [N, C] or [N, C, H, W] on a CPU with AVX2."""
    if any(tensor.device.type != "cpu" for tensor in (x, scores, mask)):
        return f"it takes CPU tensors, got {x.device}"
    if x.dtype not in _DTYPES:
        return f"it takes {', '.join(map(dtype_name, _DTYPES))}, got {x.dtype}"
    if x.dim() not in (2, 4):
        return f"it takes [N, C] and [N, C, H, W], got {x.dim()} dimensions"
    if native.why_not() is None and not native.has_isa("avx2"):
        return "it needs avx2"
    return native.why_not()


def run(x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    x, factors = _dense(x), mask.float()
    y = torch.empty_like(x)
    sizes = (x.numel() // max(x.shape[1], 1), x.shape[1])
    native.library().channel_mask(
        DTYPE_NAMES[x.dtype], x.data_ptr(), y.data_ptr(), *sizes, factors.data_ptr(), torch.get_num_threads()
    )
    return y


def run_backward(
    grad: Tensor, x: Tensor, scores: Tensor, mask: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scores, each empty where it is not wanted."""
    grad, x, factors = _dense(grad.to(x.dtype)), _dense(x), mask.float()
    grad_x = torch.empty_like(x) if wants[0] else x.new_empty(0)
    sums = torch.empty(scores.shape if wants[1] else 0, dtype=torch.float32, device="cpu")
    native.library().channel_mask_backward(
        DTYPE_NAMES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        grad_x.data_ptr() if wants[0] else 0,
        x.numel() // max(x.shape[1], 1),
        x.shape[1],
        factors.data_ptr(),
        sums.data_ptr() if wants[1] else 0,
        torch.get_num_threads(),
    )
    return grad_x, (scores.sign() * sums).to(scores.dtype) if wants[1] else scores.new_empty(0)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
