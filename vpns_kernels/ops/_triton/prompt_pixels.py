"""What does a kernel of prompt_conv2d read where it reads a pixel? A number of the canvas, normalised.

A tap (r, s, c) of output (p, q) meets the pixel y = p · stride - padding + r · dilation, x alike, of colour
c. Within the image it is, by the source of the canvas:

- "levels": the level of a byte, from a table of what each byte of each colour becomes;
- "floats": (v - mean) / std of a number v;
- "prompted": (clamp(v + prompt, 0, 1) - mean) / std, the prompt on the outermost pixels alone;
- "canvas": the number itself, normalised before.

Elsewhere it is zero, the convolution's padding. A framed canvas is the sum of an image with zeros around it
and of a frame, one for all images, with zeros in it: to the first the frame is more padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair


class Image(NamedTuple):
    """Images [N, 3, height, width] as one argument of a kernel; strides in entries."""

    ptr: Tensor
    table_ptr: Tensor
    prompt_ptr: Tensor
    height: int
    width: int
    frame: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int


class Filter(NamedTuple):
    """A convolution's sizes as one constant of a kernel; what lies around the images is padding too."""

    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int

    @classmethod
    def of(cls, geometry: ConvGeometry, ring: int = 0) -> Filter:
        g = geometry
        return cls(*g.kernel_size, *g.stride, g.padding[0] + ring, g.padding[1] + ring, *g.dilation)


@dataclass(frozen=True)
class Pixels:
    """Images [N, 3, height, width] as the kernels read them, within `ring` pixels of zeros on each side."""

    images: Tensor
    table: Tensor  # [3, 256] levels, or [3, 2] means and deviations, by the source
    source: str
    ring: int = 0
    prompt: Tensor | None = None  # [3, height, width], float32
    frame: int = 0  # width of the prompt, where the source is "prompted"

    @property
    def canvas(self) -> Pair:
        """Height and width with the ring."""
        height, width = self.images.shape[2:]
        return height + 2 * self.ring, width + 2 * self.ring

    @property
    def argument(self) -> Image:
        """What kernels take."""
        prompt = self.table if self.prompt is None else self.prompt
        height, width = self.images.shape[2:]
        return Image(self.images, self.table, prompt, height, width, self.frame, *self.images.stride())


@triton.jit
def outputs_from(start, P, Q):
    """Image of the output `start` (int64) and its place in it, by one division of large numbers."""
    image = start // (P * Q)
    return image, (start - image * (P * Q)).to(tl.int32)


@triton.jit
def outputs_at(image, places, P, Q):
    """Image, place in it, row and column of outputs, given as places counted from the first of an image."""
    place = places % (P * Q)
    return image + places // (P * Q), place, place // Q, place % Q


@triton.jit
def taps_at(offs_t, FILTER: tl.constexpr):
    """Rows and columns from an output's first pixel, and colour, of the taps; what is no tap is far away."""
    row = offs_t // (3 * FILTER.S)
    down = tl.where(row < FILTER.R, row * FILTER.dilation_h, 1 << 29)
    return down, offs_t // 3 % FILTER.S * FILTER.dilation_w, offs_t % 3


@triton.jit
def unit(image_ptr, places, mask):
    """Pixels from 0 to 1, in float32; zero where mask is not."""
    pixel = tl.load(image_ptr + places, mask=mask, other=0).to(tl.float32)
    return quotient(pixel, 255.0) if image_ptr.dtype.element_ty == tl.uint8 else pixel


@triton.jit
def quotient(value, divisor):
    """value / divisor of finite numbers, rounded as a division is: one step of Newton from a fused remainder.

    Fewer instructions than a division has; the reciprocal is the same for many pixels.
    """
    inverse = tl.div_rn(1.0, divisor)
    first = value * inverse
    return tl.fma(tl.fma(-first, divisor, value), inverse, first)


@triton.jit
def is_framed(y, x, height, width, frame):
    return (y < frame) | (y >= height - frame) | (x < frame) | (x >= width - frame)


@triton.jit
def load_pixels(image, places, y, x, c, SOURCE: tl.constexpr):
    """The canvas at rows y, columns x and colours c (they make a tile), found at places; else zero."""
    mask = (y >= 0) & (y < image.height) & (x >= 0) & (x < image.width)
    if SOURCE == "canvas":
        found = tl.load(image.ptr + places, mask=mask, other=0.0)
    elif SOURCE == "levels":
        byte = tl.load(image.ptr + places, mask=mask, other=0).to(tl.int32)
        found = tl.load(image.table_ptr + (c * 256 + byte), mask=mask, other=0.0)
    else:
        value = unit(image.ptr, places, mask)
        mean, std = tl.load(image.table_ptr + 2 * c), tl.load(image.table_ptr + 2 * c + 1)
        if SOURCE == "prompted":
            has_prompt = mask & is_framed(y, x, image.height, image.width, image.frame)
            at_prompt = (c * image.height + y) * image.width + x
            value += tl.load(image.prompt_ptr + at_prompt, mask=has_prompt, other=0.0)
            # Comparisons, not a maximum: NaN stays NaN.
            value = tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))
            found = quotient(value - mean, std)
        else:
            found = tl.div_rn(value - mean, std)
        found = tl.where(mask, found, 0.0)
    return found
