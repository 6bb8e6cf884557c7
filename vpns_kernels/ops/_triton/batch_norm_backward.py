"""Batch norm backward: sums of g and g · x̂ over rows, then dx = (g - (Σg + x̂ · Σg·x̂) / rows) · weight / σ.

g is dy where the activation passed, which the output y tells; x̂ = (x - mean) / σ and σ² = variance + eps. The
first kernel leaves one pair of sums per split of rows; summed over the splits in one order they are the
gradients of bias and weight. The second reads dy, x and y again and writes dx and, for a residual, g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vpns_kernels.ops._triton.batch_norm_forward import precision


@triton.jit
def passed(grad_ptr, y_ptr, places, mask, ACT: tl.constexpr):
    """dy where the activation passed it, in float32; zero where mask is not."""
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if ACT != "none":
        y = tl.load(y_ptr + places, mask=mask, other=0.0)
        grad = tl.where(y > 0, grad, 0.0)
        if ACT == "relu6":
            grad = tl.where(y < 6, grad, 0.0)
    return grad


@triton.jit
def batch_norm_sums(
    grad_ptr,  # [rows, channels], as x and y
    x_ptr,
    y_ptr,
    mean_ptr,  # [channels], float32, as variance
    variance_ptr,
    of_grad_ptr,  # [splits, channels], float32: sums of g, of g · x̂
    of_product_ptr,
    rows,
    channels,
    rows_per_split,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    scale = precision(variance_ptr, offs_c, mask_c, EPS)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    of_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    of_product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & mask_c[None, :]
        places = offs_m[:, None] * channels + offs_c[None, :]
        grad = passed(grad_ptr, y_ptr, places, mask, ACT)
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        of_grad += grad
        # Beyond the rows grad is zero, and x - mean is finite or shows NaN that is there anyway.
        of_product += grad * (x - mean[None, :])
    places = split.to(tl.int64) * channels + offs_c
    tl.store(of_grad_ptr + places, tl.sum(of_grad, axis=0), mask=mask_c)
    tl.store(of_product_ptr + places, tl.sum(of_product, axis=0) * scale, mask=mask_c)


@triton.jit
def batch_norm_act_bwd(
    grad_ptr,  # [rows, channels], as x, y, grad_x and grad_residual
    x_ptr,
    y_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    weight_ptr,  # [channels], float32, as those that follow
    mean_ptr,
    variance_ptr,
    grad_bias_ptr,
    grad_weight_ptr,
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
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    of_grad = tl.load(grad_bias_ptr + offs_c, mask=mask_c, other=0.0) / rows
    of_product = tl.load(grad_weight_ptr + offs_c, mask=mask_c, other=0.0) / rows
    grad = passed(grad_ptr, y_ptr, places, mask, ACT)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * scale[None, :]
    grad_x = (grad - of_grad[None, :] - normal * of_product[None, :]) * (weight * scale)[None, :]
    tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        # These are the numbers of dy itself: nothing is rounded.
        tl.store(grad_residual_ptr + places, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
