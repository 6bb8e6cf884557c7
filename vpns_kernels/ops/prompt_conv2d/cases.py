"""First layers of networks, and images and frames that they can get wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops.case import Case

# Geometry, images, height and width of the image, frame.
LAYERS: dict[str, tuple[ConvGeometry, int, tuple[int, int], int]] = {
    "resnet": (ConvGeometry(3, 64, (7, 7), (2, 2), (3, 3)), 2, (32, 32), 8),
    "cifar": (ConvGeometry(3, 16, (3, 3), padding=(1, 1)), 5, (24, 24), 4),
    "mobile": (ConvGeometry(3, 33, (3, 3), (2, 2), (1, 1)), 1, (19, 23), 2),
    "5x5": (ConvGeometry(3, 17, (5, 5), (1, 1), (2, 2)), 2, (11, 11), 1),
    "no_frame": (ConvGeometry(3, 40, (5, 5), (3, 2), (0, 1)), 2, (15, 17), 0),
    "frame_16": (ConvGeometry(3, 8, (7, 7), (2, 2), (3, 3)), 3, (9, 7), 16),
    "dilated": (ConvGeometry(3, 24, (3, 2), (2, 1), (1, 3), (2, 3)), 2, (13, 12), 3),
    "one_pixel": (ConvGeometry(3, 5, (1, 1)), 1, (1, 1), 1),
    "patches": (ConvGeometry(3, 96, (4, 4), (4, 4)), 2, (16, 16), 4),
    "empty": (ConvGeometry(3, 16, (3, 3), padding=(1, 1)), 0, (8, 8), 2),
    "depthwise": (ConvGeometry(3, 6, (3, 3), padding=(1, 1), groups=3), 2, (8, 8), 2),
}


def build_args(
    layer: str, variant: str, pixels: torch.dtype, dtype: torch.dtype, kind: str = "plain"
) -> dict[str, Any]:
    """The arguments of prompt_conv2d; float images are channels_last."""
    geometry, count, (height, width), frame = LAYERS[layer]
    generator = torch.Generator().manual_seed(7)
    image = torch.randint(0, 256, (count, 3, height, width), generator=generator).to(torch.uint8)
    if pixels != torch.uint8:
        # Multiples of 1 / 8 meet the edges of the clamp exactly, as do the prompt's.
        eighths = torch.randint(0, 9, image.shape, generator=generator).to(pixels) / 8
        image = eighths.contiguous(memory_format=torch.channels_last)
    ring = frame if variant == "framed" else 0
    if variant == "released":
        frame = min(frame, (min(height, width) - 1) // 2)
    size = (3, height + 2 * ring, width + 2 * ring)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    prompt = torch.randint(-8, 9, size, generator=generator).to(wide) / 8
    weight = torch.randn(geometry.weight_shape, generator=generator).to(wide)
    if kind == "masked":
        weight = weight * (torch.rand(weight.shape, generator=generator) < 0.2)
    elif kind == "few_taps":
        weight = weight * (torch.rand(weight.shape[2:], generator=generator) < 0.2)
    return {
        "image": image,
        "prompt": None if kind == "no_prompt" else prompt,
        "weight": weight,
        "geometry": geometry,
        "frame": frame,
        "variant": variant,
        "bias": torch.randn(geometry.out_channels, generator=generator).to(wide) if kind == "bias" else None,
        "dtype": dtype,
    }


_ROWS: list[tuple[str, str, torch.dtype, torch.dtype, str]] = [
    (layer, variant, torch.uint8, dtype, "plain")
    for layer in LAYERS
    for variant in ("framed", "released")
    for dtype in (torch.float32, torch.bfloat16)
]
_ROWS += [
    (layer, variant, torch.float32, torch.float32, kind)
    for layer in ("resnet", "mobile")
    for variant in ("framed", "released")
    for kind in ("plain", "masked", "few_taps", "no_prompt", "bias")
]
_ROWS += [("resnet", "framed", torch.uint8, torch.bfloat16, kind) for kind in ("bias", "few_taps")]
_ROWS += [("cifar", variant, torch.float64, torch.float64, "bias") for variant in ("framed", "released")]

CASES = [
    Case("-".join([layer, variant, dtype_name(pixels), dtype_name(dtype), kind]), partial(build_args, *row))
    for row in _ROWS
    for layer, variant, pixels, dtype, kind in [row]
]
