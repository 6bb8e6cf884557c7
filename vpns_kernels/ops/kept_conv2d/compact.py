"""Compact backend: the smaller dense convolution of what is kept, by torch, where counting it is free."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops.kept_conv2d import reference

# Of more channels than this share gathering costs about what it spares.
MOST_KEPT = 0.5


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_mask: Tensor,
    output_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> str | None:
    """Tensors of the CPU, no groups."""
    if any(tensor.device.type != "cpu" for tensor in (x, weight, input_mask)):
        return f"it counts what is kept, for which {x.device} would have to be waited for"
    return None if groups == 1 else f"it takes groups=1, got {groups}"


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_mask: Tensor,
    output_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Convolve the kept input channels alone, [N, C, H, W] → [N, K, P, Q]; all where too many are kept."""
    kept = _few(input_mask)
    if kept is not None:
        x, weight = _gather(x, kept), weight.to(x.dtype).index_select(1, kept)
    return reference.run(x, weight, bias, input_mask, output_mask, stride, padding, dilation, groups)


def run_input_gradient(
    grad: Tensor,
    weight: Tensor,
    output_mask: Tensor | None,
    x_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """The gradient of x from the kept output channels alone; from all where too many are kept."""
    kept = None if output_mask is None else _few(output_mask)
    if kept is not None:
        grad, weight = _gather(grad, kept), weight.to(grad.dtype).index_select(0, kept)
    return reference.run_input_gradient(grad, weight, None, x_shape, stride, padding, dilation, groups)


def _few(mask: Tensor) -> Tensor | None:
    """The kept channels, where gathering them spares something."""
    kept = mask.nonzero()[:, 0]
    return kept if 0 < kept.numel() <= MOST_KEPT * mask.numel() else None


def _gather(x: Tensor, kept: Tensor) -> Tensor:
    """Of [N, C, H, W], channels_last: there channels are the last index."""
    return x.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)
