"""What of a canvas is made once for all images? What each byte becomes, normalised, and their frame.

That is 768 numbers, and one image of which the inside is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton.launch import Launch
from vpns_kernels.ops._triton.prompt_pixels import Pixels, is_framed

_BLOCK = 1024


@triton.jit
def colour_tables(
    levels_ptr,  # [3, 256], of the type of products
    colours_ptr,  # [3, 2], float32: mean and std
    MEAN_R: tl.constexpr,
    MEAN_G: tl.constexpr,
    MEAN_B: tl.constexpr,
    STD_R: tl.constexpr,
    STD_G: tl.constexpr,
    STD_B: tl.constexpr,
):
    c = tl.program_id(0)
    mean = tl.where(c == 0, MEAN_R, tl.where(c == 1, MEAN_G, MEAN_B)).to(tl.float32)
    std = tl.where(c == 0, STD_R, tl.where(c == 1, STD_G, STD_B)).to(tl.float32)
    tl.store(colours_ptr + 2 * c, mean)
    tl.store(colours_ptr + 2 * c + 1, std)
    byte = tl.arange(0, 256)
    level = tl.div_rn(tl.div_rn(byte.to(tl.float32), 255.0) - mean, std)
    tl.store(levels_ptr + c * 256 + byte, level.to(levels_ptr.dtype.element_ty))


@triton.jit
def frame_canvas(
    opacity_ptr,  # [3, height, width], float32
    colours_ptr,  # [3, 2], float32: mean and std
    canvas_ptr,  # [3, height, width], of the type of products
    height,
    width,
    frame,
    HAS_PROMPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < 3 * height * width
    c, y, x = offs // (height * width), offs // width % height, offs % width
    value = tl.zeros((BLOCK,), tl.float32)
    if HAS_PROMPT:
        value = tl.load(opacity_ptr + offs, mask=mask, other=0.0)
    mean = tl.load(colours_ptr + 2 * c, mask=mask, other=0.0)
    level = tl.div_rn(value - mean, tl.load(colours_ptr + 2 * c + 1, mask=mask, other=1.0))
    level = tl.where(is_framed(y, x, height, width, frame), level, 0.0)
    tl.store(canvas_ptr + offs, level.to(canvas_ptr.dtype.element_ty), mask=mask)


def make_tables(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Levels [3, 256] of all bytes, in dtype, and colours [3, 2], in float32."""
    levels = torch.empty((3, 256), dtype=dtype, device=device)
    colours = torch.empty((3, 2), dtype=torch.float32, device=device)
    names = ("MEAN_R", "MEAN_G", "MEAN_B", "STD_R", "STD_G", "STD_B")
    constants = dict(zip(names, map(float, (*mean, *std)), strict=True))
    args = {"levels_ptr": levels, "colours_ptr": colours}
    Launch(colour_tables, (3,), args, constants, warps=1, stages=1).run()
    return levels, colours


def make_frame(opacity: Tensor | None, colours: Tensor, size: Pair, frame: int, dtype: torch.dtype) -> Pixels:
    """The frame as a canvas of one image: the normalised prompt, or black, around zeros."""
    canvas = torch.empty((1, 3, *size), dtype=dtype, device=colours.device)
    args = {
        "opacity_ptr": colours if opacity is None else opacity,
        "colours_ptr": colours,
        "canvas_ptr": canvas,
        "height": size[0],
        "width": size[1],
        "frame": frame,
    }
    constants = {"HAS_PROMPT": opacity is not None, "BLOCK": _BLOCK}
    Launch(frame_canvas, (triton.cdiv(canvas.numel(), _BLOCK),), args, constants, warps=4, stages=1).run()
    return Pixels(canvas, colours, "canvas")
