"""What does a network see? The image with its prompt, normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a canvas is composed in before it is rounded to `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_unit(image: Tensor, wide: torch.dtype) -> Tensor:
    """Pixels from 0 to 1."""
    return image.to(wide) / 255 if image.dtype == torch.uint8 else image.to(wide)


def frame_mask(height: int, width: int, frame: int, device: torch.device) -> Tensor:
    """Bool [H, W], True on the frame."""
    mask = torch.ones(height, width, dtype=torch.bool, device=device)
    mask[frame : height - frame, frame : width - frame] = False
    return mask


def compose(pixels: Tensor, prompt: Tensor | None, frame: int, variant: str) -> Tensor:
    """Canvas [N, 3, H, W] of pixels [N, 3, h, w] from 0 to 1."""
    canvas = F.pad(pixels, (frame,) * 4) if variant == "framed" else pixels
    if prompt is None:
        return canvas
    mask = frame_mask(canvas.shape[2], canvas.shape[3], frame, canvas.device)
    if variant == "framed":
        return torch.where(mask, prompt.to(canvas.dtype).sigmoid(), canvas)
    return (canvas + torch.where(mask, prompt.to(canvas.dtype), 0)).clamp(0, 1)


def normalise(canvas: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(canvas - mean) / std by colour; the colours are the third dimension from the end."""
    centre, scale = (canvas.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (canvas - centre) / scale
