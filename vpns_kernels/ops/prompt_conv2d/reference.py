"""The truth: compose the canvas, normalise it, convolve with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops.prompt_conv2d.canvas import compose, normalise, to_unit, wide_dtype


def why_not(image: Tensor, *rest: object) -> str | None:
    """The reference takes everything that torch convolves."""
    return None


def run(
    image: Tensor,
    prompt: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    frame: int,
    variant: str,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    canvas = compose(to_unit(image, wide_dtype(dtype)), prompt, frame, variant)
    x = normalise(canvas, mean, std).to(dtype)
    y = F.conv2d(
        x, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding, dilation, groups
    )
    return y.contiguous(memory_format=torch.channels_last)


def run_backward(
    grad: Tensor,
    image: Tensor,
    prompt: Tensor | None,
    weight: Tensor,
    frame: int,
    variant: str,
    mean: Sequence[float],
    std: Sequence[float],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prompt, weight and bias, each empty where it is not wanted."""
    with torch.enable_grad():
        leaf_weight, leaf_bias = (
            weight.detach().requires_grad_(),
            weight.new_zeros(len(weight)).requires_grad_(),
        )
        leaf_prompt = None if prompt is None else prompt.detach().requires_grad_()
        settings = (frame, variant, mean, std, stride, padding, dilation, groups, grad.dtype)
        y = run(image, leaf_prompt, leaf_weight, leaf_bias, *settings)
    leaves = (leaf_prompt, leaf_weight, leaf_bias)
    found = [
        torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]
        if wanted and leaf is not None
        else weight.new_empty(0)
        for leaf, wanted in zip(leaves, wants, strict=True)
    ]
    return found[0], found[1], found[2]
