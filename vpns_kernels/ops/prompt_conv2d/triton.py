"""Triton backend: the images where they lie and the frame, by the linearity of a framed canvas.

Framed: y = conv(images, zeros around) + map, the map [P, Q, K] being the convolution of the frame alone, one
image for the whole batch. Released: the prompt lies on the images and is clamped with them, pixel by pixel.
Products are of the type asked for, as are canvas and weight; sums, map and gradients are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton.backend import HALVES, is_interpreted
from vpns_kernels.ops._triton.columns import sum_rows
from vpns_kernels.ops._triton.launch import dot_precision
from vpns_kernels.ops._triton.prompt_canvas import make_frame, make_tables
from vpns_kernels.ops._triton.prompt_forward import convolve
from vpns_kernels.ops._triton.prompt_gradient import prompt_gradient
from vpns_kernels.ops._triton.prompt_pixels import Pixels
from vpns_kernels.ops._triton.prompt_weight_gradient import weight_gradient


def why_not(
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
) -> str | None:
    """Results in float32 or halves without float64 anywhere, one group."""
    tensors = (image, prompt, weight, bias)
    if dtype not in (torch.float32, *HALVES) or any(
        tensor is not None and tensor.dtype == torch.float64 for tensor in tensors
    ):
        return f"it gives float32 and halves without float64 anywhere, got {dtype} and {weight.dtype}"
    if is_interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly (a GPU does not)"
    if groups != 1:
        return f"it takes one group, got {groups}"
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
    geometry = ConvGeometry(3, len(weight), (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    canvas = _Canvas(image, prompt, frame, variant, mean, std, dtype)
    filters = _filters(weight, dtype)
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    frame_map, precision = None, dot_precision(dtype)
    if canvas.has_ring:
        frame_map = _empty_output(1, geometry, canvas, torch.float32)
        convolve(canvas.ring, filters, wide_bias, None, frame_map, geometry, precision)
    y = _empty_output(len(image), geometry, canvas, dtype)
    convolve(canvas.images, filters, wide_bias, frame_map, y, geometry, precision)
    return y


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
    geometry = ConvGeometry(3, len(weight), (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    canvas = _Canvas(image, prompt, frame, variant, mean, std, grad.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    N, K, P, Q = grad.shape
    total, precision = grad, dot_precision(grad.dtype)
    if canvas.has_ring and any(wants):
        # Of all images together: what the frame, one for all of them, is multiplied with.
        sums = sum_rows(grad.permute(0, 2, 3, 1).reshape(N, P * Q * K))
        total = sums.view(1, P, Q, K).permute(0, 3, 1, 2)
        # Sums keep their digits, three products of TF32 each; there are few.
        precision = "tf32x3" if grad.dtype in HALVES else precision
    grad_prompt, grad_weight, grad_bias = (weight.new_empty(0) for _ in range(3))
    if wants[0] and prompt is not None:
        filters = _filters(weight, grad.dtype).to(total.dtype)
        read = canvas.opacity if variant == "framed" else canvas.images.prompt
        assert read is not None
        found = prompt_gradient(
            total, canvas.images, read, canvas.colours, filters, frame, geometry, precision
        )
        grad_prompt = found.to(prompt.dtype)
    if wants[1]:
        parts = [(canvas.images, grad, dot_precision(grad.dtype))]
        if canvas.has_ring:
            parts.append((canvas.ring, total, precision))
        found = weight_gradient(parts, geometry).view(*geometry.kernel_size, 3, K)
        grad_weight = found.permute(3, 2, 0, 1).contiguous().to(weight.dtype)
    if wants[2]:
        grad_bias = sum_rows(total.permute(0, 2, 3, 1).reshape(-1, K)).to(weight.dtype)
    return grad_prompt, grad_weight, grad_bias


@dataclass(frozen=True)
class _Canvas:
    """What the network sees, in the parts that the kernels read."""

    image: Tensor
    prompt: Tensor | None
    frame: int
    variant: str
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype

    @property
    def has_ring(self) -> bool:
        """Whether there is a frame around the images."""
        return self.variant == "framed" and self.frame > 0

    @cached_property
    def images(self) -> Pixels:
        if self.variant == "released" and self.prompt is not None:
            prompt = self.prompt.detach().float().contiguous()
            return Pixels(self.image, self.colours, "prompted", prompt=prompt, frame=self.frame)
        ring = self.frame if self.variant == "framed" else 0
        is_bytes = self.image.dtype == torch.uint8
        table, source = (self._tables[0], "levels") if is_bytes else (self.colours, "floats")
        return Pixels(self.image, table, source, ring)

    @cached_property
    def ring(self) -> Pixels:
        return make_frame(self.opacity, self.colours, self.images.canvas, self.frame, self.dtype)

    @cached_property
    def opacity(self) -> Tensor | None:
        """sigmoid(prompt) of a framed canvas."""
        if self.prompt is None or self.variant != "framed":
            return None
        return self.prompt.detach().float().sigmoid().contiguous()

    @property
    def colours(self) -> Tensor:
        return self._tables[1]

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return make_tables(self.mean, self.std, self.dtype, self.image.device)


def _filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, S, 3, K]: a row of output channels for each tap."""
    return weight.detach().to(dtype).permute(2, 3, 1, 0).contiguous()


def _empty_output(count: int, geometry: ConvGeometry, canvas: _Canvas, dtype: torch.dtype) -> Tensor:
    shape = (count, geometry.out_channels, *geometry.output_size(*canvas.images.canvas))
    device = canvas.image.device
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
