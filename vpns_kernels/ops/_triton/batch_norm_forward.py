"""Batch norm forward: statistics of [rows, channels] by splits of rows, their union, then y.

Each entry of a tile counts its n rows and keeps a = Σ(x - s) and b = Σ(x - s)², where s is its first x, so
that nothing large cancels: mean m = s + a / n, spread v = b - a² / n. Parts are united in one order, by
M = Σ n·m / Σ n and V = Σ (v + n·(m - M)²); a second kernel unites the splits the same way. The third reads
x and residual again and writes y = act((x - M) / sqrt(V / rows + eps) · weight + bias + residual).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def batch_norm_statistics(
    x_ptr,  # [rows, channels]
    means_ptr,  # [splits, channels], float32, as spreads
    spreads_ptr,
    rows,
    channels,
    rows_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    offs_m = first + tl.arange(0, BLOCK_M)
    mask = (offs_m < last)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * channels + offs_c[None, :], mask=mask, other=0.0)
    shift = x.to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row in range(first + BLOCK_M, last, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * channels + offs_c[None, :], mask=mask, other=0.0)
        away = tl.where(mask, x.to(tl.float32) - shift, 0.0)
        sums += away
        squares += away * away
    # Rows of the split that this entry has seen: first + its own number, and every BLOCK_M-th after.
    counts = (last - first - tl.arange(0, BLOCK_M) + (BLOCK_M - 1)) // BLOCK_M
    counts = tl.maximum(counts, 0).to(tl.float32)[:, None]
    part = sums / tl.maximum(counts, 1.0)
    mean, spread = unite(counts, shift + part, squares - sums * part)
    places = split.to(tl.int64) * channels + offs_c
    tl.store(means_ptr + places, mean, mask=mask_c)
    tl.store(spreads_ptr + places, spread, mask=mask_c)


@triton.jit
def batch_norm_union(
    means_ptr,  # [splits, channels], float32, as spreads
    spreads_ptr,
    mean_ptr,  # [channels], float32, as variance
    variance_ptr,
    rows,
    channels,
    rows_per_split,
    splits,
    BLOCK_S: tl.constexpr,  # at least splits
    BLOCK_C: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_s < splits)[:, None] & (offs_c < channels)[None, :]
    places = offs_s[:, None] * channels + offs_c[None, :]
    means = tl.load(means_ptr + places, mask=mask, other=0.0)
    spreads = tl.load(spreads_ptr + places, mask=mask, other=0.0)
    before = offs_s.to(tl.int64) * rows_per_split
    counts = tl.maximum(tl.minimum(rows - before, rows_per_split), 0).to(tl.float32)[:, None]
    mean, spread = unite(counts, means, spreads)
    tl.store(mean_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(variance_ptr + offs_c, spread / rows, mask=offs_c < channels)


@triton.jit
def unite(counts, means, spreads):
    """Mean and spread of the union of parts: counts [parts, 1], means and spreads [parts, channels]."""
    total = tl.sum(counts, axis=0)
    mean = tl.sum(counts * means, axis=0) / total
    away = means - mean[None, :]
    return mean, tl.sum(spreads + counts * away * away, axis=0)


@triton.jit
def batch_norm_act_fwd(
    x_ptr,  # [rows, channels], as residual and y
    residual_ptr,
    y_ptr,
    weight_ptr,  # [channels], float32, as those that follow
    bias_ptr,
    mean_ptr,
    variance_ptr,
    rows,
    channels,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mask = (offs_m < rows)[:, None] & mask_c[None, :]
    places = offs_m[:, None] * channels + offs_c[None, :]
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    scale = precision(variance_ptr, offs_c, mask_c, EPS)
    scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    # Comparisons, not a maximum: NaN stays NaN.
    if ACT != "none":
        y = tl.where(y < 0, 0.0, y)
    if ACT == "relu6":
        y = tl.where(y > 6, 6.0, y)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def precision(variance_ptr, offs_c, mask_c, EPS: tl.constexpr):
    """1 / sqrt(variance + eps) of each channel."""
    variance = tl.load(variance_ptr + offs_c, mask=mask_c, other=1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
