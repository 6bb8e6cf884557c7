"""CPU backend: csrc/cpu/prompt_conv2d.*; only the prompt itself, one image, is normalised by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops.prompt_conv2d.canvas import compose, frame_mask, normalise, to_unit

_DTYPES = (torch.float32, torch.bfloat16)


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
    """uint8 or float32 images, one group, results in float32 or bfloat16, on a CPU with AVX2."""
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in (image, prompt, weight, bias)):
        return "it takes CPU tensors"
    if image.dtype not in (torch.uint8, torch.float32):
        return f"it takes images of uint8 or float32, got {image.dtype}"
    if dtype not in _DTYPES or any(
        tensor is not None and tensor.dtype == torch.float64 for tensor in (prompt, weight, bias)
    ):
        return f"it gives float32 or bfloat16 without float64 anywhere, got {dtype} and {weight.dtype}"
    if groups != 1:
        return f"it takes one group, got {groups}"
    if native.why_not() is None and not native.has_isa("avx2"):
        return "it needs avx2"
    return native.why_not()


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
    kernel: str = "",
) -> Tensor:
    """`kernel` names one of the library's prompt_conv2d_kernels; by default the first that can."""
    canvas = _Canvas(image, prompt, weight, frame, variant, mean, std, (stride, padding, dilation), dtype)
    y = torch.empty(canvas.output_shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    rounded = weight.to(dtype).contiguous()
    wide_bias = None if bias is None else bias.float().contiguous()
    native.library().prompt_conv2d(
        canvas.sizes,
        canvas.handle,
        rounded.data_ptr(),
        y.data_ptr(),
        DTYPE_NAMES[dtype],
        0 if wide_bias is None else wide_bias.data_ptr(),
        torch.get_num_threads(),
        kernel,
    )
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
    kernel: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prompt, weight and bias, each empty where it is not wanted."""
    conv = (stride, padding, dilation)
    canvas = _Canvas(image, prompt, weight, frame, variant, mean, std, conv, grad.dtype)
    wants_prompt = wants[0] and prompt is not None
    _, _, H, W = canvas.shape
    # Zeros, not empty: without images the kernel has nothing to write.
    shapes = (
        (H, W, 3) if wants_prompt else 0,
        weight.shape if wants[1] else 0,
        weight.shape[0] if wants[2] else 0,
    )
    grad_canvas, grad_weight, grad_bias = (
        torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes
    )
    if grad.numel() > 0:
        grad = grad.contiguous(memory_format=torch.channels_last)
        rounded = weight.to(grad.dtype).float().contiguous()
        native.library().prompt_conv2d_backward(
            canvas.sizes,
            canvas.handle,
            rounded.data_ptr(),
            grad.data_ptr(),
            DTYPE_NAMES[grad.dtype],
            *(found.data_ptr() for found in (grad_canvas, grad_weight, grad_bias)),
            torch.get_num_threads(),
            kernel,
        )
    if not wants_prompt or prompt is None:
        return weight.new_empty(0), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    grad_prompt = grad_canvas.permute(2, 0, 1) / grad_canvas.new_tensor(std).view(3, 1, 1)
    if variant == "framed":
        opacity = prompt.detach().float().sigmoid()
        grad_prompt = torch.where(
            frame_mask(H, W, frame, prompt.device), grad_prompt * (opacity * (1 - opacity)), 0
        )
    return (
        grad_prompt.to(prompt.dtype).contiguous(),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


class _Canvas:
    """The images and their prompt as the library takes them; holds the tensors that it points to."""

    def __init__(
        self,
        image: Tensor,
        prompt: Tensor | None,
        weight: Tensor,
        frame: int,
        variant: str,
        mean: Sequence[float],
        std: Sequence[float],
        conv: tuple[Pair, Pair, Pair],
        dtype: torch.dtype,
    ) -> None:
        N, _, h, w = image.shape
        ring = frame if variant == "framed" else 0
        self.shape = (N, 3, h + 2 * ring, w + 2 * ring)
        K, _, R, S = weight.shape
        geometry = ConvGeometry(3, K, (R, S), *conv)
        P, Q = geometry.output_size(*self.shape[2:])
        self.output_shape = (N, K, P, Q)
        self.sizes = [*self.shape, K, R, S, P, Q, *(size for pair in conv for size in pair), 1]
        if variant == "released" and prompt is None:
            frame = 0
        settings = torch.tensor([list(mean), list(std)], dtype=torch.float32, device="cpu")
        levels = to_unit(torch.arange(256, dtype=torch.uint8, device="cpu"), torch.float32).expand(3, 1, 256)
        levels = normalise(levels, mean, std).to(dtype).float().contiguous()
        frame_canvas = raw = None
        if variant == "framed":
            black = image.new_zeros((1, 3, h, w), dtype=torch.float32)
            detached = None if prompt is None else prompt.detach()
            frame_canvas = normalise(compose(black, detached, frame, variant), mean, std)[0]
            frame_canvas = frame_canvas.to(dtype).float().permute(1, 2, 0).contiguous()
        elif prompt is not None:
            raw = prompt.detach().float().permute(1, 2, 0).contiguous()
        self._tensors = (image, settings, levels, frame_canvas, raw)
        self.handle: Any = native.library().PromptedImages(
            self.sizes,
            image.data_ptr(),
            image.dtype == torch.uint8,
            list(image.stride()),
            frame,
            0 if frame_canvas is None else frame_canvas.data_ptr(),
            0 if raw is None else raw.data_ptr(),
            levels.data_ptr(),
            settings[0].data_ptr(),
            settings[1].data_ptr(),
            dtype == torch.bfloat16,
        )
