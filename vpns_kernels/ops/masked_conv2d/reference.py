"""The truth: zeros where the weight is masked, then torch's convolution and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.patterns import parse_pattern


def why_not(x: Tensor, *rest: object) -> str | None:
    """The reference takes everything that torch convolves."""
    return None


def run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    masked = _masked(weight, mask, pattern).to(x.dtype)
    y = F.conv2d(x, masked, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last)


def run_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """[N, C, H, W] as x, channels_last."""
    masked = _masked(weight, mask, pattern).to(x.dtype)
    sizes = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    grad_x: Tensor
    grad_x, _, _ = torch.ops.aten.convolution_backward(
        _like(grad, x), x, masked, None, *sizes, [True, False, False]
    )
    return grad_x.contiguous(memory_format=torch.channels_last)


def run_score_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """sign(S) · Σ_unit W · dW, as scores."""
    sizes = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    _, dense, _ = torch.ops.aten.convolution_backward(
        _like(grad, x), x, weight.to(x.dtype), None, *sizes, [False, True, False]
    )
    sums = parse_pattern(pattern).reduce_sum(weight * dense.to(weight.dtype))
    return (scores.sign() * sums).to(scores.dtype)


def _masked(weight: Tensor, mask: Tensor, pattern: str) -> Tensor:
    return weight * parse_pattern(pattern).expand(mask, tuple(weight.shape))


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """In the memory format of x: torch's kernels round differently from one format to the other."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return grad.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
