"""prompt_conv2d: a visual prompt around images, their normalisation and the first convolution, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import schemas
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.prompt_conv2d import cpu, reference
from vpns_kernels.ops.registry import call, register_op

__all__ = ["prompt_conv2d"]

VARIANTS = ("framed", "released")
# Of ImageNet, as for all networks that torchvision publishes.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_OP = register_op(
    "prompt_conv2d", {"cpu": cpu, "triton": TritonBackend("prompt_conv2d"), "reference": reference}
)


def _dispatch_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Each gradient by the backend of its pass, the bias's by the weight's; empty where it is not wanted."""
    *inputs, wants, (_, of_prompt, of_weight) = args
    if of_prompt == of_weight:
        found: tuple[Tensor, Tensor, Tensor] = _OP.module(of_weight).run_backward(*inputs, wants)
        return found
    grad_prompt, _, _ = _OP.module(of_prompt).run_backward(*inputs, (wants[0], False, False))
    _, *others = _OP.module(of_weight).run_backward(*inputs, (False, *wants[1:]))
    return grad_prompt, *others


schemas.LIBRARY.impl("prompt_conv2d_backward", _dispatch_backward, "CompositeExplicitAutograd")


def prompt_conv2d(
    image: Tensor,
    prompt: Tensor | None,
    weight: Tensor,
    geometry: ConvGeometry,
    frame: int,
    variant: str = "framed",
    bias: Tensor | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype | None = None,
    backend: str | Sequence[str] = "auto",
) -> Tensor:
    """Convolve ((canvas - mean) / std); differentiable once in prompt, weight and bias.

    "framed": the canvas is the image with sigmoid(prompt) in a frame around it, H = h + 2 · frame.
    "released": it is clamp(image + prompt, 0, 1) with the prompt on the outermost pixels of the image, H = h.
    Without a prompt the frame is black, or the image stays as it is. The convolution pads with zeros after
    the normalisation.

    Args:
        image: [N, 3, h, w]; uint8 from 0 to 255, or floating from 0 to 1.
        prompt: [3, H, W] of the whole canvas, floating, or None; what lies inside the frame is not read.
        weight: [K, 3 / groups, R, S], masked already; float32 (or float64).
        frame: width of the prompt in pixels.
        bias: [K], or None.
        mean, std: of each colour, for images from 0 to 1.
        dtype: of the result, to which normalised canvas and weight are rounded; by default the weight's.
        backend: "cpu", "triton", "reference", or "auto" for the first that can; one for all passes, or three:
            of forward, of the prompt's gradient, of those of weight and bias.

    Returns:
        [N, K, P, Q] in `dtype`, channels_last. The prompt's gradient is zero inside the frame.

    Raises:
        ValueError: shapes or values that do not fit.
        NotImplementedError: an image that needs a gradient, or a backend that cannot run this; says why.

    Example:
        >>> image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        >>> geometry = ConvGeometry(3, 2, (3, 3), padding=(1, 1))
        >>> prompt_conv2d(image, torch.zeros(3, 8, 8), torch.ones(2, 3, 3, 3), geometry, frame=2).shape
        torch.Size([1, 2, 8, 8])
    """
    _check_image(image, prompt, frame, variant, mean, std)
    if geometry.in_channels != 3:
        raise ValueError(f"prompt_conv2d: expected in_channels 3, got {geometry.in_channels}")
    if tuple(weight.shape) != geometry.weight_shape or not weight.is_floating_point():
        raise ValueError(
            f"prompt_conv2d: expected a floating weight {list(geometry.weight_shape)}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
        raise ValueError(f"prompt_conv2d: expected bias [{geometry.out_channels}], got {list(bias.shape)}")
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"prompt_conv2d: expected a floating dtype, got {dtype}")
    geometry.output_size(*schemas.canvas_size(image, frame, variant))
    g = geometry
    sizes = (g.stride, g.padding, g.dilation, g.groups)
    args = (image, prompt, weight, bias, frame, variant, list(mean), list(std), *sizes, dtype)
    learns = [tensor is not None and tensor.requires_grad for tensor in (prompt, weight, bias)]
    wants = (True, learns[0], learns[1] or learns[2]) if torch.is_grad_enabled() else (True, False, False)
    result: Tensor = call("prompt_conv2d")(*args, _OP.resolve_passes(backend, *args, wants=wants))
    return result


def _check_image(
    image: Tensor,
    prompt: Tensor | None,
    frame: int,
    variant: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 1:
        raise ValueError(f"prompt_conv2d: expected image [N, 3, h, w], got {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"prompt_conv2d: expected an image of uint8 or floats, got {image.dtype}")
    if torch.is_grad_enabled() and image.requires_grad:
        raise NotImplementedError("prompt_conv2d: expected an image without gradient, got one that needs it")
    if variant not in VARIANTS:
        raise ValueError(f"prompt_conv2d: expected variant in {VARIANTS}, got {variant!r}")
    H, W = schemas.canvas_size(image, frame, variant)
    if frame < 0 or 2 * frame >= min(H, W):
        raise ValueError(f"prompt_conv2d: expected 0 <= 2 * frame < {min(H, W)}, got frame={frame}")
    if prompt is not None and (tuple(prompt.shape) != (3, H, W) or not prompt.is_floating_point()):
        raise ValueError(
            f"prompt_conv2d: expected a floating prompt [3, {H}, {W}], "
            f"got {prompt.dtype} {list(prompt.shape)}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"prompt_conv2d: expected {name} of 3 numbers, got {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"prompt_conv2d: expected std above 0, got {list(std)}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, prompt, weight, bias, *settings, _, backends = inputs
    ctx.save_for_backward(image, prompt, weight)
    ctx.settings, ctx.backends = settings, backends
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("prompt_conv2d: expected a first derivative, got a request for the second")
    image, prompt, weight = ctx.saved_tensors
    wants = [bool(wanted) for wanted in ctx.needs_input_grad[1:4]]
    found = call("prompt_conv2d_backward")(grad, image, prompt, weight, *ctx.settings, wants, ctx.backends)
    grad_prompt, grad_weight, grad_bias = (
        tensor if wanted else None for tensor, wanted in zip(found, wants, strict=True)
    )
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return None, grad_prompt, grad_weight, grad_bias, *(None,) * 10


torch.library.register_autograd("vpns::prompt_conv2d", _backward, setup_context=_save, lib=schemas.LIBRARY)
