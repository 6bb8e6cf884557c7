"""dweight[t, k] = Σ over outputs (n, p, q) of canvas[n, pixel of tap t at (p, q)] · dy[n, p, q, k].

An implicit product of matrices: a program takes BLOCK_T taps and BLOCK_K channels, goes over the outputs of
its split by BLOCK_M at a time, gathers their pixels [BLOCK_T, BLOCK_M] from the images where they lie, and
leaves a float32 sum. The sums of all splits, of images and of a frame around them, are added in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.columns import sum_rows
from vpns_kernels.ops._triton.launch import Launch
from vpns_kernels.ops._triton.prompt_pixels import (
    Filter,
    Pixels,
    load_pixels,
    outputs_at,
    outputs_from,
    taps_at,
)

# Programs that fill the largest GPU, and steps below which a program is not worth its start.
_PROGRAMS = 512
_STEPS_PER_SPLIT = 16


@dataclass(frozen=True)
class Tiles:
    """A split has `outputs_per_split` outputs, a multiple of block_m, but for the last one."""

    block_m: int
    block_k: int
    block_t: int
    splits: int
    outputs_per_split: int
    warps: int
    stages: int


def pick_tiles(geometry: ConvGeometry, outputs: int, dtype: torch.dtype) -> Tiles:
    """64 taps, a product's rows on tensor cores; as many splits of the outputs as keep a GPU busy.

    Eight warps and 32 outputs (16 in float32, whose operands a thread has in registers), so that a thread
    gathers few pixels and two programs share a multiprocessor.
    """
    block_m = 16 if dtype == torch.float32 else 32
    taps, K = 3 * geometry.kernel_size[0] * geometry.kernel_size[1], geometry.out_channels
    block_t, block_k = (min(64, max(16, triton.next_power_of_2(size))) for size in (taps, K))
    wanted = max(1, _PROGRAMS // (triton.cdiv(taps, block_t) * triton.cdiv(K, block_k)))
    steps = triton.cdiv(outputs, block_m)
    steps_per_split = max(1, triton.cdiv(steps, wanted), min(steps, _STEPS_PER_SPLIT))
    splits = max(1, triton.cdiv(steps, steps_per_split))
    return Tiles(block_m, block_k, block_t, splits, steps_per_split * block_m, warps=8, stages=2)


@triton.jit
def prompt_conv2d_wgrad(
    image,
    grad_ptr,  # [N, P, Q, K]
    sums_ptr,  # [splits, taps, K], float32
    N,
    K,
    P,
    Q,
    outputs_per_split,
    SOURCE: tl.constexpr,
    FILTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    TAPS: tl.constexpr = 3 * FILTER.R * FILTER.S
    split = tl.program_id(2).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    down, right, c = taps_at(offs_t, FILTER)
    steps = down.to(tl.int64) * image.stride_h + right.to(tl.int64) * image.stride_w
    steps += c.to(tl.int64) * image.stride_c
    outputs = N * (P * Q) + tl.zeros((), tl.int64)
    begin = split * outputs_per_split
    count = tl.minimum(outputs - begin, outputs_per_split).to(tl.int32)
    first_image, before = outputs_from(begin, P, Q)
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for step in range(0, count, BLOCK_M):
        offs_m = step + tl.arange(0, BLOCK_M)
        n, _, p, q = outputs_at(first_image, before + offs_m, P, Q)
        # The first pixel of each output; beyond the last output it is far outside.
        y0 = tl.where(n < N, p * FILTER.stride_h - FILTER.pad_h, -(1 << 30))
        x0 = q * FILTER.stride_w - FILTER.pad_w
        origins = n * image.stride_n + y0.to(tl.int64) * image.stride_h + x0.to(tl.int64) * image.stride_w
        pixels = load_pixels(
            image,
            steps[:, None] + origins[None, :],
            down[:, None] + y0[None, :],
            right[:, None] + x0[None, :],
            c[:, None],
            SOURCE,
        )
        # A split ends with a tile, or with the outputs.
        mask_g = (n < N)[:, None] & (offs_k < K)[None, :]
        grad = tl.load(grad_ptr + (begin + offs_m)[:, None] * K + offs_k[None, :], mask=mask_g, other=0.0)
        acc = tl.dot(pixels.to(grad.dtype), grad, acc, input_precision=PRECISION)
    mask = (offs_t < TAPS)[:, None] & (offs_k < K)[None, :]
    tl.store(sums_ptr + (split * TAPS + offs_t[:, None]) * K + offs_k[None, :], acc, mask=mask)


def weight_gradient(parts: Sequence[tuple[Pixels, Tensor, str]], geometry: ConvGeometry) -> Tensor:
    """[R · S · 3 · K] in float32, summed over parts of the canvas and the gradients of their outputs.

    Args:
        parts: pixels, a gradient [N, K, P, Q], channels_last, whose type is that of the products, and the
            products' precision.
    """
    plans = [pick_tiles(geometry, grad.numel() // grad.shape[1], grad.dtype) for _, grad, _ in parts]
    taps, K = 3 * geometry.kernel_size[0] * geometry.kernel_size[1], geometry.out_channels
    count = sum(tiles.splits for tiles in plans)
    sums = torch.empty((count, taps * K), dtype=torch.float32, device=parts[0][1].device)
    first = 0
    for (pixels, grad, precision), tiles in zip(parts, plans, strict=True):
        _sum_products(pixels, grad, sums[first:], tiles, geometry, precision)
        first += tiles.splits
    return sum_rows(sums)


def _sum_products(
    pixels: Pixels, grad: Tensor, sums: Tensor, tiles: Tiles, geometry: ConvGeometry, precision: str
) -> None:
    N, K, P, Q = grad.shape
    constants = {
        "SOURCE": pixels.source,
        "FILTER": Filter.of(geometry, pixels.ring),
        "PRECISION": precision,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "BLOCK_T": tiles.block_t,
    }
    args = {
        "image": pixels.argument,
        "grad_ptr": grad,
        "sums_ptr": sums,
        "N": N,
        "K": K,
        "P": P,
        "Q": Q,
        "outputs_per_split": tiles.outputs_per_split,
    }
    taps = 3 * geometry.kernel_size[0] * geometry.kernel_size[1]
    grid = (triton.cdiv(taps, tiles.block_t), triton.cdiv(K, tiles.block_k), tiles.splits)
    Launch(prompt_conv2d_wgrad, grid, args, constants, tiles.warps, tiles.stages).run()
