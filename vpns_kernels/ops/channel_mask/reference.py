"""The truth: a product with the mask; the scores' gradient is a sum of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def why_not(x: Tensor, scores: Tensor, mask: Tensor) -> str | None:
    """The reference takes everything."""
    return None


def run(x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    return _dense(x * _along_channels(mask, x))


def run_backward(
    grad: Tensor, x: Tensor, scores: Tensor, mask: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scores, each empty where it is not wanted."""
    grad_x, grad_scores = x.new_empty(0), scores.new_empty(0)
    if wants[0]:
        grad_x = _dense(grad * _along_channels(mask, grad))
    if wants[1]:
        others = [axis for axis in range(x.dim()) if axis != 1]
        wide = torch.promote_types(x.dtype, scores.dtype)
        products = x.to(wide) * grad.to(wide)
        grad_scores = (scores.sign() * products.sum(others)).to(scores.dtype)
    return grad_x, grad_scores


def _along_channels(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(1, -1, *(1 for _ in x.shape[2:])).to(x.dtype)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
