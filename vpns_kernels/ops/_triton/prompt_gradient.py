"""dprompt[c, y, x] = Σ_n slope · Σ over taps that meet (y, x), and k, of dy[n, p, q, k] · weight[r, s, c, k].

Of the frame alone: a program takes pixels of one row, all with the same remainder of x by the stride, so that
a filter column meets all of them or none, and goes over images, taps and channels. Framed, the batch was
summed before and counts as one image; slope = σ'(prompt) / std. Released, slope is 1 / std where image +
prompt lies within 0 and 1. Where there is no frame the gradient is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.columns import sum_rows
from vpns_kernels.ops._triton.launch import Launch
from vpns_kernels.ops._triton.prompt_pixels import Filter, Pixels, is_framed, unit

# Images that a program goes over at least, and groups of images at most.
_IMAGES_PER_SPLIT = 4
_SPLITS = 32


@dataclass(frozen=True)
class Tiles:
    """A split has `images_per_split` images, but for the last one."""

    block_x: int
    block_k: int
    splits: int
    images_per_split: int
    warps: int
    stages: int


def pick_tiles(geometry: ConvGeometry, images: int, width: int, dtype: torch.dtype) -> Tiles:
    """Up to 64 pixels of a row, up to 64 channels at a time, groups of images.

    Of float32, whose products no tensor core takes, 32 and 16: a thread has their operands in registers.
    """
    across = triton.cdiv(width, geometry.stride[1])
    most_x, most_k = (32, 16) if dtype == torch.float32 else (64, 64)
    block_x = min(most_x, max(16, triton.next_power_of_2(across)))
    block_k = min(most_k, max(16, triton.next_power_of_2(geometry.out_channels)))
    each = max(_IMAGES_PER_SPLIT, triton.cdiv(images, _SPLITS))
    return Tiles(block_x, block_k, max(1, triton.cdiv(images, each)), each, warps=4, stages=2)


@triton.jit
def prompt_conv2d_pgrad(
    grad_ptr,  # [N, P, Q, K]
    image,
    prompt_ptr,  # [3, H, W], float32; sigmoid of it where the images have the frame around them
    colours_ptr,  # [3, 2], float32: mean and std
    weight_ptr,  # [R, S, 3, K], of the gradient's type
    sums_ptr,  # [splits, 3, H, W], float32
    H,
    W,
    frame,
    N,
    K,
    P,
    Q,
    images_per_split,
    IS_RING: tl.constexpr,
    FILTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    y = tl.program_id(0)
    remainder = tl.program_id(1) % FILTER.stride_w
    split = tl.program_id(2)
    across = tl.program_id(1) // FILTER.stride_w * BLOCK_X + tl.arange(0, BLOCK_X)
    x = remainder + FILTER.stride_w * across
    # The colours, in the least columns that a product has.
    c = tl.arange(0, 16)
    framed = (x < W) & is_framed(y + tl.zeros_like(x), x, H, W, frame)
    mask_p = framed[:, None] & (c < 3)[None, :]
    places = (c * H + y)[None, :] * W + x[:, None]
    prompt = tl.load(prompt_ptr + places, mask=mask_p, other=0.0)
    std = tl.load(colours_ptr + 2 * c + 1, mask=c < 3, other=1.0)
    total = tl.zeros((BLOCK_X, 16), tl.float32)
    begin = split * images_per_split
    # A program without frame has no images to go over.
    end = tl.where(tl.max(framed.to(tl.int32), axis=0) > 0, tl.minimum(begin + images_per_split, N), begin)
    for n in range(begin, end):
        number = n + tl.zeros((), tl.int64)
        acc = tl.zeros((BLOCK_X, 16), tl.float32)
        for r in range(FILTER.R):
            down = y + FILTER.pad_h - r * FILTER.dilation_h
            p = down // FILTER.stride_h
            if (down >= 0) & (down % FILTER.stride_h == 0) & (p < P):
                for s in range(FILTER.S):
                    if (remainder + FILTER.pad_w - s * FILTER.dilation_w) % FILTER.stride_w == 0:
                        right = x + FILTER.pad_w - s * FILTER.dilation_w
                        q = right // FILTER.stride_w
                        mask_q = framed & (right >= 0) & (q < Q)
                        outputs = ((number * P + p) * Q + q) * K
                        filters = ((r * FILTER.S + s) * 3 + c) * K
                        for first in range(0, K, BLOCK_K):
                            offs_k = first + tl.arange(0, BLOCK_K)
                            mask_g = mask_q[:, None] & (offs_k < K)[None, :]
                            grad = tl.load(
                                grad_ptr + outputs[:, None] + offs_k[None, :], mask=mask_g, other=0.0
                            )
                            mask_w = (offs_k < K)[:, None] & (c < 3)[None, :]
                            weight = tl.load(
                                weight_ptr + filters[None, :] + offs_k[:, None], mask=mask_w, other=0.0
                            )
                            acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
        if not IS_RING:
            row = number * image.stride_n + y.to(tl.int64) * image.stride_h
            of_colour, of_column = c.to(tl.int64) * image.stride_c, x.to(tl.int64) * image.stride_w
            value = unit(image.ptr, row + of_colour[None, :] + of_column[:, None], mask_p) + prompt
            # At its edges the clamp passes the gradient, as torch's does.
            acc = tl.where((value >= 0) & (value <= 1), acc, 0.0)
        total += acc
    if IS_RING:
        total = total * (prompt * (1 - prompt))
    total = tl.where(mask_p, tl.div_rn(total, std[None, :]), 0.0)
    mask = (x < W)[:, None] & (c < 3)[None, :]
    tl.store(sums_ptr + split.to(tl.int64) * 3 * H * W + places, total, mask=mask)


def prompt_gradient(
    grad: Tensor,
    images: Pixels,
    prompt: Tensor,
    colours: Tensor,
    weight: Tensor,
    frame: int,
    geometry: ConvGeometry,
    precision: str,
) -> Tensor:
    """[3, H, W] in float32.

    Args:
        grad: [N, K, P, Q], channels_last; [1, K, P, Q] of the whole batch where images have a ring.
        prompt: [3, H, W], float32; its sigmoid where images have a ring.
        colours: [3, 2], float32: mean and std.
        weight: [R, S, 3, K], contiguous, of grad's type.
    """
    g, (H, W) = geometry, images.canvas
    N, K, P, Q = grad.shape
    tiles = pick_tiles(g, N, W, grad.dtype)
    sums = torch.empty((tiles.splits, 3 * H * W), dtype=torch.float32, device=grad.device)
    args = {
        "grad_ptr": grad,
        "image": images.argument,
        "prompt_ptr": prompt,
        "colours_ptr": colours,
        "weight_ptr": weight,
        "sums_ptr": sums,
        "H": H,
        "W": W,
        "frame": frame,
        "N": N,
        "K": K,
        "P": P,
        "Q": Q,
        "images_per_split": tiles.images_per_split,
    }
    constants = {
        "IS_RING": images.source != "prompted",
        "FILTER": Filter.of(g),
        "PRECISION": precision,
        "BLOCK_X": tiles.block_x,
        "BLOCK_K": tiles.block_k,
    }
    across = triton.cdiv(triton.cdiv(W, g.stride[1]), tiles.block_x) * g.stride[1]
    Launch(prompt_conv2d_pgrad, (H, across, tiles.splits), args, constants, tiles.warps, tiles.stages).run()
    return (sums[0] if tiles.splits == 1 else sum_rows(sums)).view(3, H, W)
