"""y[n, p, q, k] = Σ over taps t of canvas[n, pixel of t at p, q] · weight[t, k] + bias[k] (or map[p, q, k]).

An implicit product of matrices: a program takes BLOCK_M outputs of one or more images and BLOCK_K channels,
and goes over the taps (r, s, c), packed without gaps, by BLOCK_T at a time. It gathers their pixels
[BLOCK_M, BLOCK_T] from the images where they lie, in any strides; the canvas is nowhere in memory. A program
whose outputs see no image, but a frame alone, multiplies nothing. The map is what a frame around the images
adds to each place, and the bias; it is read where outputs see anything beyond the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.launch import Launch
from vpns_kernels.ops._triton.prompt_pixels import (
    Filter,
    Pixels,
    load_pixels,
    outputs_at,
    outputs_from,
    taps_at,
)


@dataclass(frozen=True)
class Tiles:
    """How much a program computes: outputs (block_m), filters (block_k) and taps at a time (block_t)."""

    block_m: int
    block_k: int
    block_t: int
    warps: int
    stages: int


def pick_tiles(geometry: ConvGeometry, source: str, dtype: torch.dtype) -> Tiles:
    """64 outputs for each group of four warps; taps by 16, so that two programs share a multiprocessor.

    A thread keeps an address and a predicate of each pixel that it gathers: with 32 taps they take all its
    registers, and one program is alone with the latency of its loads. Of a prompted canvas nothing is loaded
    ahead: its prompt and colours are read again and again, and are near.
    """
    stages = 1 if source == "prompted" else 2
    block_k = min(64, max(16, triton.next_power_of_2(geometry.out_channels)))
    if dtype == torch.float32:
        return Tiles(64, block_k, 16, warps=4, stages=stages)
    return Tiles(128, block_k, 16, warps=8, stages=stages)


@triton.jit
def prompt_conv2d_fwd(
    image,
    weight_ptr,  # [taps, K]
    bias_ptr,  # [K], float32
    map_ptr,  # [P, Q, K], float32
    y_ptr,  # [N, P, Q, K]
    N,
    K,
    P,
    Q,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SOURCE: tl.constexpr,
    FILTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    TAPS: tl.constexpr = 3 * FILTER.R * FILTER.S
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_image, before = outputs_from(start, P, Q)
    n, place, p, q = outputs_at(first_image, before + tl.arange(0, BLOCK_M), P, Q)
    # The first pixel of each output; beyond the last output it is far outside.
    y0 = tl.where(n < N, p * FILTER.stride_h - FILTER.pad_h, -(1 << 30))
    x0 = q * FILTER.stride_w - FILTER.pad_w
    origins = n * image.stride_n + y0.to(tl.int64) * image.stride_h + x0.to(tl.int64) * image.stride_w
    reach_h: tl.constexpr = (FILTER.R - 1) * FILTER.dilation_h
    reach_w: tl.constexpr = (FILTER.S - 1) * FILTER.dilation_w
    sees = (y0 + reach_h >= 0) & (y0 < image.height) & (x0 + reach_w >= 0) & (x0 < image.width)
    end = TAPS * tl.max(sees.to(tl.int32), axis=0)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, end, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        down, right, c = taps_at(offs_t, FILTER)
        steps = down.to(tl.int64) * image.stride_h + right.to(tl.int64) * image.stride_w
        steps += c.to(tl.int64) * image.stride_c
        pixels = load_pixels(
            image,
            origins[:, None] + steps[None, :],
            y0[:, None] + down[None, :],
            x0[:, None] + right[None, :],
            c[None, :],
            SOURCE,
        )
        mask_w = (offs_t < TAPS)[:, None] & (offs_k < K)[None, :]
        weight = tl.load(weight_ptr + offs_t[:, None] * K + offs_k[None, :], mask=mask_w, other=0.0)
        acc = tl.dot(pixels.to(weight.dtype), weight, acc, input_precision=PRECISION)
    mask = (n < N)[:, None] & (offs_k < K)[None, :]
    offset = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias_ptr + offs_k, mask=offs_k < K, other=0.0)[None, :]
    if HAS_MAP:
        sees_more = (y0 < 0) | (y0 + reach_h >= image.height) | (x0 < 0) | (x0 + reach_w >= image.width)
        places = place.to(tl.int64)[:, None] * K + offs_k[None, :]
        beyond = tl.load(map_ptr + places, mask=mask & sees_more[:, None], other=0.0)
        offset = tl.where(sees_more[:, None], beyond, offset)
    acc += offset
    offs_m = start + tl.arange(0, BLOCK_M)
    tl.store(y_ptr + offs_m[:, None] * K + offs_k[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def convolve(
    pixels: Pixels,
    weight: Tensor,
    bias: Tensor | None,
    frame_map: Tensor | None,
    y: Tensor,
    geometry: ConvGeometry,
    precision: str,
) -> None:
    """Write y [N, K, P, Q], channels_last.

    Args:
        weight: [R, S, 3, K], contiguous, of the type of products.
        bias: [K], float32, or None.
        frame_map: [1, K, P, Q], float32, channels_last, bias included, or None.
    """
    N, K, P, Q = y.shape
    tiles = pick_tiles(geometry, pixels.source, weight.dtype)
    constants = {
        "HAS_BIAS": bias is not None,
        "HAS_MAP": frame_map is not None,
        "SOURCE": pixels.source,
        "FILTER": Filter.of(geometry, pixels.ring),
        "PRECISION": precision,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "BLOCK_T": tiles.block_t,
    }
    args = {
        "image": pixels.argument,
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "map_ptr": weight if frame_map is None else frame_map,
        "y_ptr": y,
        "N": N,
        "K": K,
        "P": P,
        "Q": Q,
    }
    grid = (triton.cdiv(N * P * Q, tiles.block_m), triton.cdiv(K, tiles.block_k))
    Launch(prompt_conv2d_fwd, grid, args, constants, tiles.warps, tiles.stages).run()
