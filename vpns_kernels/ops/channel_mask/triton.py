"""Triton backend: y[m, c] = x[m, c] · mask[c]; dx = dy · mask; dS[c] = sign(S[c]) · Σ_m x[m, c] · dy[m, c].

An activation is a matrix of rows (pixels, or images of a linear layer) × channels. Forward writes a tile per
program. Backward reads x and dy once: a program goes down the rows of its split, writes their dx and keeps
the products' float32 sums; the splits are then summed in one order (`_triton/columns.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.backend import HALVES
from vpns_kernels.ops._triton.columns import pick_tiles, sum_rows
from vpns_kernels.ops._triton.launch import Launch


@triton.jit
def channel_mask_fwd(
    x_ptr,  # [rows, channels], as y
    mask_ptr,  # [channels], of bytes
    y_ptr,
    rows,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_m < rows)[:, None] & (offs_c < channels)[None, :]
    places = offs_m[:, None] * channels + offs_c[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0.0)
    kept = tl.load(mask_ptr + offs_c, mask=offs_c < channels, other=0)
    # A product, so that NaN and infinity stay visible in what is masked.
    tl.store(y_ptr + places, x * kept.to(x.dtype)[None, :], mask=mask)


@triton.jit
def channel_mask_bwd(
    grad_ptr,  # [rows, channels], as x and grad_x
    x_ptr,
    mask_ptr,
    grad_x_ptr,
    sums_ptr,  # [splits, channels], float32
    rows,
    channels,
    rows_per_split,
    WANTS_X: tl.constexpr,
    WANTS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = tl.load(mask_ptr + offs_c, mask=offs_c < channels, other=0)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & (offs_c < channels)[None, :]
        places = offs_m[:, None] * channels + offs_c[None, :]
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
        if WANTS_X:
            tl.store(grad_x_ptr + places, grad * kept.to(grad.dtype)[None, :], mask=mask)
        if WANTS_SUMS:
            x = tl.load(x_ptr + places, mask=mask, other=0.0)
            acc += x.to(tl.float32) * grad.to(tl.float32)
    if WANTS_SUMS:
        sums = tl.sum(acc, axis=0)
        tl.store(sums_ptr + split.to(tl.int64) * channels + offs_c, sums, mask=offs_c < channels)


def why_not(x: Tensor, scores: Tensor, mask: Tensor) -> str | None:
    """float32 and half activations [N, C] or [N, C, H, W]."""
    if x.dtype not in (torch.float32, *HALVES) or scores.dtype == torch.float64:
        return f"it takes float32, bfloat16 and float16, got {x.dtype} with scores of {scores.dtype}"
    if x.dim() not in (2, 4):
        return f"it takes [N, C] and [N, C, H, W], got {x.dim()} dimensions"
    return None


def run(x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    x = _dense(x)
    y = torch.empty_like(x)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tiles = pick_tiles(rows, channels)
    Launch(
        channel_mask_fwd,
        (triton.cdiv(rows, tiles.block_m), triton.cdiv(channels, tiles.block_c)),
        {"x_ptr": x, "mask_ptr": _bytes(mask), "y_ptr": y, "rows": rows, "channels": channels},
        tiles.constants,
        warps=tiles.warps,
        stages=1,
    ).run()
    return y


def run_backward(
    grad: Tensor, x: Tensor, scores: Tensor, mask: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scores, each empty where it is not wanted."""
    grad, x = _dense(grad.to(x.dtype)), _dense(x)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tiles = pick_tiles(rows, channels)
    grad_x = torch.empty_like(x) if wants[0] else x.new_empty(0)
    splits = tiles.splits if wants[1] else 0
    sums = torch.empty((splits, channels), dtype=torch.float32, device=x.device)
    Launch(
        channel_mask_bwd,
        (triton.cdiv(channels, tiles.block_c), tiles.splits),
        {
            "grad_ptr": grad,
            "x_ptr": x,
            "mask_ptr": _bytes(mask),
            "grad_x_ptr": grad_x,
            "sums_ptr": sums,
            "rows": rows,
            "channels": channels,
            "rows_per_split": tiles.rows_per_split,
        },
        {"WANTS_X": bool(wants[0]), "WANTS_SUMS": bool(wants[1]), **tiles.constants},
        warps=tiles.warps,
        stages=1,
    ).run()
    if not wants[1]:
        return grad_x, scores.new_empty(0)
    return grad_x, (scores.sign() * sum_rows(sums)).to(scores.dtype)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
