"""How does a program read a box of pixels, or a block of a weight? By a descriptor, or by addresses.

From Hopper on a copy engine reads what a descriptor tells. Before it Triton turns a descriptor into one load
for each entry: it knows neither that rows begin at multiples of 16 bytes nor that channels are there or not
by as many at a time, so it reads two bytes of a half precision at a time, which no asynchronous copy does.
There kernels get a tensor's sizes and steps in units of 16 bytes, and read such units. So they do for full
products of float32 anywhere: threads multiply them, and spill with operands that lie as tensor cores want.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.launch import ALIGNMENT_BYTES, describe

_UNIT_BYTES = tl.constexpr(ALIGNMENT_BYTES)
# The first capability with a copy engine.
_HOPPER = 9


def is_by_address(capability: int) -> bool:
    """Whether kernels get sizes and steps instead of a descriptor.

    Args:
        capability: that of the products (launch.product_capability).
    """
    return capability < _HOPPER


def as_boxes(tensor: Tensor, block: Sequence[int], capability: int) -> Any:
    """What `load_box` and `load_block` take of a tensor whose rows are aligned: a descriptor of boxes, or
    (tensor, its sizes, its steps but the last, 1); the last size and the steps in units of 16 bytes.
    """
    if not is_by_address(capability):
        return describe(tensor, block)
    unit = ALIGNMENT_BYTES // tensor.element_size()
    steps = [step // unit for step in tensor.stride()[:-1]]
    return (tensor, *tensor.shape[:-1], tensor.shape[-1] // unit, *steps)


@triton.jit
def load_box(
    x,
    n0,
    p0,
    q0,
    c0,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
):
    """[BLOCK_N · BLOCK_P · BLOCK_Q, BLOCK_C] of [N, H, W, C]; zero beyond its edges."""
    PIXELS: tl.constexpr = BLOCK_N * BLOCK_P * BLOCK_Q
    if BY_ADDRESS:
        ptr, N, H, W, units, step_n, step_h, step_w = x
        UNIT: tl.constexpr = _UNIT_BYTES * 8 // ptr.dtype.element_ty.primitive_bitwidth
        pixel = tl.arange(0, PIXELS)
        n = n0 + pixel // (BLOCK_P * BLOCK_Q)
        p = p0 + pixel // BLOCK_Q % BLOCK_P
        q = q0 + pixel % BLOCK_Q
        c = c0 + tl.arange(0, BLOCK_C)
        is_inside = (n < N) & (p >= 0) & (p < H) & (q >= 0) & (q < W)
        row = (n.to(tl.int64) * step_n + p.to(tl.int64) * step_h + q.to(tl.int64) * step_w) * UNIT
        mask = is_inside[:, None] & (c < units * UNIT)[None, :]
        return tl.load(ptr + row[:, None] + c[None, :], mask=mask, other=0.0)
    else:
        return x.load([n0, p0, q0, c0]).reshape(PIXELS, BLOCK_C)


@triton.jit
def load_block(w, number, k0, c0, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BY_ADDRESS: tl.constexpr):
    """[BLOCK_K, BLOCK_C] of [count, K, C]; zero beyond its edges."""
    if BY_ADDRESS:
        ptr, _, K, units, step, step_k = w
        UNIT: tl.constexpr = _UNIT_BYTES * 8 // ptr.dtype.element_ty.primitive_bitwidth
        k, c = k0 + tl.arange(0, BLOCK_K), c0 + tl.arange(0, BLOCK_C)
        row = (tl.cast(number, tl.int64) * step + k.to(tl.int64) * step_k) * UNIT
        mask = (k < K)[:, None] & (c < units * UNIT)[None, :]
        return tl.load(ptr + row[:, None] + c[None, :], mask=mask, other=0.0)
    else:
        return w.load([number, k0, c0]).reshape(BLOCK_K, BLOCK_C)
