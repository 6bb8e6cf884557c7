"""How do blocks get their gradients? As products over pixels, of only those blocks that want one.

    dw[b] = Σ over pixels m:  dy[m, k]ᵀ · x[m + shift, c]     for a block b (k, c, a tap)

A program owns a block (for scores, a tile of blocks that share a tap) and a share of the pixels; both
operands are boxes read by descriptors, as in block_conv.py. Shares are summed afterwards, in one order.
Scores need of each block only Σ w · dw: one number leaves the kernel, and no dense gradient exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton.boxes import as_boxes, is_by_address, load_box
from vpns_kernels.ops._triton.launch import Launch, dot_precision, product_capability
from vpns_kernels.ops._triton.rows import as_rows, split_classes
from vpns_kernels.ops._triton.taps import list_taps, tap_table
from vpns_kernels.ops._triton.tiles import PixelTile, pick_gradient_tiles, pick_split

# Channels of a tile of blocks, along each side.
_TILE = 128


def weight_gradient(
    grad: Tensor, x: Tensor, entries: Tensor, counts: tuple[int, ...], block: Pair, geometry: ConvGeometry
) -> Tensor:
    """[count, bk, bc] float32, in the order of the entries.

    Args:
        entries: int64 [count], by class: from the lowest byte, shifts of rows and columns + 128, two bytes of
            the channel block, two of the filter block.
        counts: entries of each class.
    """
    count = entries.numel()
    if count == 0 or grad.numel() == 0:
        return torch.zeros(count, *block, dtype=torch.float32, device=grad.device)
    dy, sources = as_rows(grad), split_classes(as_rows(x, geometry.stride), geometry.stride)
    N, _, P, Q = grad.shape
    tiles = pick_gradient_tiles((N, P, Q), block, grad.dtype, product_capability(grad.device, grad.dtype))
    split = pick_split(count, tiles.pixels.count(N, P, Q))
    sums = torch.empty(split, count, *block, dtype=torch.float32, device=grad.device)
    first = 0
    for source, number in zip(sources, counts, strict=True):
        args, constants = _operands(dy, source, block, tiles.pixels, split, (N, P, Q))
        args |= {"entries_ptr": entries, "sums_ptr": sums, "first": first, "count": count}
        Launch(_weight_kernel, (number, split), args, constants, tiles.warps, tiles.stages).run()
        first += number
    return sums[0] if split == 1 else sums.sum(0)


def score_sums(grad: Tensor, x: Tensor, weight: Tensor, block: Pair, geometry: ConvGeometry) -> Tensor:
    """Σ w · dw of every block, kept or not: float32 [K blocks, C blocks, R, S].

    Args:
        weight: [K, C, R, S], any strides.
    """
    K, C, R, S = weight.shape
    blocks = (-(-K // block[0]), -(-C // block[1]))
    if grad.numel() == 0:
        return torch.zeros(*blocks, R, S, dtype=torch.float32, device=grad.device)
    # As many blocks side by side as fill a tile: each then reads its operands from there.
    per_k, per_c = (_blocks_per_tile(size, number) for size, number in zip(block, blocks, strict=True))
    tile = (block[0] * per_k, block[1] * per_c)
    dy, sources = as_rows(grad), split_classes(as_rows(x, geometry.stride), geometry.stride)
    N, _, P, Q = grad.shape
    tiles = pick_gradient_tiles((N, P, Q), tile, grad.dtype, product_capability(grad.device, grad.dtype))
    tiles_k, tiles_c = -(-blocks[0] // per_k), -(-blocks[1] // per_c)
    split = pick_split(tiles_k * tiles_c * R * S, tiles.pixels.count(N, P, Q))
    sums = torch.empty(split, *blocks, R * S, dtype=torch.float32, device=grad.device)
    taps, _ = tap_table(geometry, 1, grad.device)
    first = 0
    for source, members in zip(sources, list_taps(geometry), strict=True):
        args, constants = _operands(dy, source, tile, tiles.pixels, split, (N, P, Q))
        args |= {
            "w_ptr": weight,
            "taps_ptr": taps,
            "sums_ptr": sums,
            "first": first,
            "tiles_k": tiles_k,
            "tiles_c": tiles_c,
            "blocks_k": blocks[0],
            "blocks_c": blocks[1],
            "taps": R * S,
            "K": K,
            "C": C,
            "S": S,
            **{f"stride_w{name}": weight.stride(axis) for axis, name in enumerate("kcrs")},
        }
        constants |= {"PER_K": per_k, "PER_C": per_c}
        grid = (tiles_k * tiles_c * len(members), split)
        Launch(_score_kernel, grid, args, constants, tiles.warps, tiles.stages).run()
        first += len(members)
    return (sums[0] if split == 1 else sums.sum(0)).view(*blocks, R, S)


def _blocks_per_tile(size: int, number: int) -> int:
    most = max(1, _TILE // size)
    return min(most, 1 << (number - 1).bit_length())


def _operands(
    dy: Tensor, source: Tensor, tile: Pair, box: PixelTile, split: int, sizes: tuple[int, int, int]
) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments and constants that both kernels share."""
    N, P, Q = sizes
    boxes = box.count(N, P, Q)
    shape, capability = (box.images, box.rows, box.columns), product_capability(dy.device, dy.dtype)
    args: dict[str, object] = {
        "dy": as_boxes(dy, (*shape, tile[0]), capability),
        "x": as_boxes(source, (*shape, tile[1]), capability),
        "boxes": boxes,
        "share": -(-boxes // split),
        "P": P,
        "Q": Q,
    }
    constants: dict[str, object] = {
        "BLOCK_N": box.images,
        "BLOCK_P": box.rows,
        "BLOCK_Q": box.columns,
        "BLOCK_K": tile[0],
        "BLOCK_C": tile[1],
        "BY_ADDRESS": is_by_address(capability),
        "PRECISION": dot_precision(dy.dtype),
    }
    return args, constants


@triton.jit
def _sum_pixels(
    dy,
    x,
    at_k,
    at_c,
    tap,
    boxes,
    share,
    P,
    Q,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [BLOCK_K, BLOCK_C] of this program's share of the pixels."""
    shift_p, shift_q = (tap & 0xFF) - 128, (tap >> 8 & 0xFF) - 128
    boxes_q, boxes_p = tl.cdiv(Q, BLOCK_Q), tl.cdiv(P, BLOCK_P)
    begin = tl.program_id(1) * share
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for box in range(begin, tl.minimum(begin + share, boxes)):
        q0 = box % boxes_q * BLOCK_Q
        p0 = box // boxes_q % boxes_p * BLOCK_P
        n0 = box // (boxes_q * boxes_p) * BLOCK_N
        dy_box = load_box(dy, n0, p0, q0, at_k, BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K, BY_ADDRESS)
        p, q = p0 + shift_p, q0 + shift_q
        x_box = load_box(x, n0, p, q, at_c, BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_C, BY_ADDRESS)
        acc = tl.dot(dy_box.T, x_box, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _weight_kernel(
    dy,
    x,
    boxes,
    share,
    P,
    Q,
    entries_ptr,
    sums_ptr,
    first,
    count,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (a block of the class; a share of the pixels)."""
    place = first + tl.program_id(0)
    entry = tl.load(entries_ptr + place)
    at_k, at_c = (entry >> 32 & 0xFFFF).to(tl.int32) * BLOCK_K, (entry >> 16 & 0xFFFF).to(tl.int32) * BLOCK_C
    tap = (entry & 0xFFFF).to(tl.int32)
    acc = _sum_pixels(
        dy,
        x,
        at_k,
        at_c,
        tap,
        boxes,
        share,
        P,
        Q,
        BLOCK_N,
        BLOCK_P,
        BLOCK_Q,
        BLOCK_K,
        BLOCK_C,
        BY_ADDRESS,
        PRECISION,
    )
    offs = tl.arange(0, BLOCK_K)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    slot = tl.program_id(1).to(tl.int64) * count + place
    # The sums hold whole blocks.
    tl.store(sums_ptr + slot * (BLOCK_K * BLOCK_C) + offs, acc)


@triton.jit
def _score_kernel(
    dy,
    x,
    boxes,
    share,
    P,
    Q,
    w_ptr,
    taps_ptr,
    sums_ptr,
    first,
    tiles_k,
    tiles_c,
    blocks_k,
    blocks_c,
    taps,
    K,
    C,
    S,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_K: tl.constexpr,
    PER_C: tl.constexpr,
):
    """Programs: (a tile of PER_K × PER_C blocks of one tap; a share of the pixels)."""
    tile = tl.program_id(0)
    tile_c, tile_k = tile % tiles_c, tile // tiles_c % tiles_k
    tap = tl.load(taps_ptr + first + tile // (tiles_c * tiles_k))
    at_k, at_c = tile_k * BLOCK_K, tile_c * BLOCK_C
    acc = _sum_pixels(
        dy,
        x,
        at_k,
        at_c,
        tap,
        boxes,
        share,
        P,
        Q,
        BLOCK_N,
        BLOCK_P,
        BLOCK_Q,
        BLOCK_K,
        BLOCK_C,
        BY_ADDRESS,
        PRECISION,
    )
    k, c = at_k + tl.arange(0, BLOCK_K), at_c + tl.arange(0, BLOCK_C)
    index = tap >> 16
    offs_w = k.to(tl.int64)[:, None] * stride_wk + c.to(tl.int64)[None, :] * stride_wc
    offs_w += index // S * stride_wr + index % S * stride_ws
    weight = tl.load(w_ptr + offs_w, mask=(k < K)[:, None] & (c < C)[None, :], other=0).to(tl.float32)
    product = tl.reshape(acc * weight, (PER_K, BLOCK_K // PER_K, PER_C, BLOCK_C // PER_C))
    sums = tl.sum(tl.sum(product, 3), 1)
    block_k, block_c = tile_k * PER_K + tl.arange(0, PER_K), tile_c * PER_C + tl.arange(0, PER_C)
    mask = (block_k < blocks_k)[:, None] & (block_c < blocks_c)[None, :]
    share_offs = tl.program_id(1).to(tl.int64) * blocks_k * blocks_c * taps
    offs = share_offs + (block_k[:, None] * blocks_c + block_c[None, :]) * taps + index
    tl.store(sums_ptr + offs, sums, mask=mask)
