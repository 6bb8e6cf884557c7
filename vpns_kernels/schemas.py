"""Every torch.library schema and fake kernel of the project, in one place.

A fake kernel gives the shapes, dtypes and strides of the outputs without computing: torch.compile and
torch.export need nothing else. `backend` is a resolved name, never "auto": the doors in
ops/<op>/__init__.py resolve it. `backends` are three: of forward, input gradient and weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair

LIBRARY = torch.library.Library("vpns", "DEF")

LIBRARY.define(
    "select_threshold(Tensor[] scores, int kept, str backend) -> (Tensor threshold, Tensor ties_kept)"
)
LIBRARY.define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor[] layout, Tensor? bias, int[4] weight_shape, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str[] backends) -> Tensor"
)
LIBRARY.define(
    "sparse_conv2d_fused(Tensor x, Tensor values, Tensor[] layout, Tensor? bias, Tensor? residual, "
    "int[4] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, str act, "
    "ScalarType out_dtype, str backend) -> Tensor"
)
LIBRARY.define(
    "sparse_conv2d_backward(Tensor grad, Tensor x, Tensor values, Tensor[] layout, int[4] weight_shape, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool[2] wants, str[] backends) "
    "-> (Tensor grad_x, Tensor grad_values)"
)
LIBRARY.define(
    "masked_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor scores, Tensor? bias, str pattern, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str[] backends) -> Tensor"
)
LIBRARY.define(
    "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor scores, str pattern, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool[2] wants, str[] backends) "
    "-> (Tensor grad_x, Tensor grad_scores)"
)
LIBRARY.define(
    "kept_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor input_mask, Tensor? output_mask, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str backend) -> Tensor"
)
LIBRARY.define(
    "kept_conv2d_backward(Tensor grad, Tensor weight, Tensor? output_mask, SymInt[4] x_shape, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str backend) -> Tensor"
)
LIBRARY.define("channel_mask(Tensor x, Tensor scores, Tensor mask, str backend) -> Tensor")
LIBRARY.define(
    "channel_mask_backward(Tensor grad, Tensor x, Tensor scores, Tensor mask, bool[2] wants, str backend) "
    "-> (Tensor grad_x, Tensor grad_scores)"
)
LIBRARY.define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual, str act, str backend) "
    "-> (Tensor y, Tensor mean, Tensor variance)"
)
LIBRARY.define(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor y, Tensor mean, "
    "Tensor variance, float eps, str act, bool has_residual, str backend) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
LIBRARY.define(
    "prompt_conv2d(Tensor image, Tensor? prompt, Tensor weight, Tensor? bias, int frame, str variant, "
    "float[] mean, float[] std, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "ScalarType dtype, str[] backends) -> Tensor"
)
LIBRARY.define(
    "prompt_conv2d_backward(Tensor grad, Tensor image, Tensor? prompt, Tensor weight, int frame, "
    "str variant, float[] mean, float[] std, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool[3] wants, str[] backends) -> (Tensor grad_prompt, Tensor grad_weight, Tensor grad_bias)"
)


@torch.library.register_fake("vpns::select_threshold", lib=LIBRARY)
def _select_threshold(scores: Sequence[Tensor], kept: int, backend: str) -> tuple[Tensor, Tensor]:
    return scores[0].new_empty(()), scores[0].new_empty((), dtype=torch.int64)


@torch.library.register_fake("vpns::sparse_conv2d", lib=LIBRARY)
def _sparse_conv2d(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    backends: Sequence[str],
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    return _empty_output(x, geometry, x.dtype)


@torch.library.register_fake("vpns::sparse_conv2d_fused", lib=LIBRARY)
def _sparse_conv2d_fused(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight_shape, stride, padding, dilation, groups)
    return _empty_output(x, geometry, out_dtype)


@torch.library.register_fake("vpns::sparse_conv2d_backward", lib=LIBRARY)
def _sparse_conv2d_backward(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, wants, _ = rest
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if wants[0] else x.new_empty(0)
    return grad_x, torch.empty_like(values) if wants[1] else values.new_empty(0)


@torch.library.register_fake("vpns::masked_conv2d", lib=LIBRARY)
def _masked_conv2d(
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
    backends: Sequence[str],
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    return _empty_output(x, geometry, x.dtype)


@torch.library.register_fake("vpns::masked_conv2d_backward", lib=LIBRARY)
def _masked_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, scores: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, wants, _ = rest
    return _empty_gradients(x, scores, wants)


@torch.library.register_fake("vpns::kept_conv2d", lib=LIBRARY)
def _kept_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_mask: Tensor,
    output_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    backend: str,
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    return _empty_output(x, geometry, x.dtype)


@torch.library.register_fake("vpns::kept_conv2d_backward", lib=LIBRARY)
def _kept_conv2d_backward(
    grad: Tensor, weight: Tensor, output_mask: Tensor | None, x_shape: Sequence[int], *rest: Any
) -> Tensor:
    return _empty_activation(grad.new_empty(x_shape))


@torch.library.register_fake("vpns::channel_mask", lib=LIBRARY)
def _channel_mask(x: Tensor, scores: Tensor, mask: Tensor, backend: str) -> Tensor:
    return _empty_activation(x)


@torch.library.register_fake("vpns::channel_mask_backward", lib=LIBRARY)
def _channel_mask_backward(
    grad: Tensor, x: Tensor, scores: Tensor, mask: Tensor, wants: Sequence[bool], backend: str
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, scores, wants)


@torch.library.register_fake("vpns::batch_norm_act", lib=LIBRARY)
def _batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, act: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("vpns::batch_norm_act_backward", lib=LIBRARY)
def _batch_norm_act_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_residual = torch.empty_like(grad_x) if has_residual else x.new_empty(0)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight), grad_residual


@torch.library.register_fake("vpns::prompt_conv2d", lib=LIBRARY)
def _prompt_conv2d(
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
    backends: Sequence[str],
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    P, Q = geometry.output_size(*canvas_size(image, frame, variant))
    shape = (image.shape[0], geometry.out_channels, P, Q)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)


@torch.library.register_fake("vpns::prompt_conv2d_backward", lib=LIBRARY)
def _prompt_conv2d_backward(
    grad: Tensor, image: Tensor, prompt: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants, _ = rest
    none = weight.new_empty(0)
    grad_prompt = none.clone() if prompt is None or not wants[0] else prompt.new_empty(prompt.shape)
    grad_weight = weight.new_empty(weight.shape) if wants[1] else none.clone()
    return grad_prompt, grad_weight, weight.new_empty(weight.shape[0]) if wants[2] else none.clone()


def canvas_size(image: Tensor, frame: int, variant: str) -> Pair:
    """H, W of the canvas that holds image [N, 3, h, w]: a framed one has the frame around the image."""
    ring = frame if variant == "framed" else 0
    return image.shape[2] + 2 * ring, image.shape[3] + 2 * ring


def _empty_output(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """[N, K, P, Q], channels_last."""
    P, Q = geometry.output_size(x.shape[2], x.shape[3])
    shape = (x.shape[0], geometry.out_channels, P, Q)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _empty_activation(x: Tensor) -> Tensor:
    """As x; channels_last where it has rows and columns, else contiguous."""
    channels_last, contiguous = torch.channels_last, torch.contiguous_format
    return torch.empty_like(x, memory_format=channels_last if x.dim() == 4 else contiguous)


def _empty_gradients(x: Tensor, scores: Tensor, wants: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Of x and of scores, each empty where it is not wanted."""
    grad_x = _empty_activation(x) if wants[0] else x.new_empty(0)
    return grad_x, scores.new_empty(scores.shape if wants[1] else 0)
