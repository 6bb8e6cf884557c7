"""How do the weights of kept channels get their gradients? As products over pixels, tap by tap.

    dw[tap, o, i] = Σ over pixels m:  dy[m, outputs[o]]ᵀ · x[m + shift, inputs[i]]

A program owns a tile of filters × channels of one tap and a share of the pixels; both operands are boxes read
through the lists of kept channels, as in channel_conv.py. Shares are summed afterwards, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton.channel_lists import PackedChannels
from vpns_kernels.ops._triton.channel_rows import ChannelRows, gather
from vpns_kernels.ops._triton.channel_tiles import pick_channel_gradient_tiles
from vpns_kernels.ops._triton.launch import Launch, capability_of, dot_precision
from vpns_kernels.ops._triton.rows import is_far
from vpns_kernels.ops._triton.taps import list_taps, tap_table
from vpns_kernels.ops._triton.tiles import pick_split


def weight_gradient(grad: Tensor, x: Tensor, channels: PackedChannels, geometry: ConvGeometry) -> Tensor:
    """[kept K, kept C, R, S] float32, from grad [N, K, P, Q] and x [N, C, H, W] of one dtype."""
    (R, S), N, (P, Q) = geometry.kernel_size, grad.shape[0], grad.shape[2:]
    kept = (channels.outputs.most_kept, channels.inputs.most_kept)
    if 0 in kept or grad.numel() == 0:
        return torch.zeros(*kept, R, S, dtype=torch.float32, device=grad.device)
    dy, rows = ChannelRows.of(grad, channels.outputs), ChannelRows.of(x, channels.inputs, geometry.stride)
    is_run, capability = dy.is_run and rows.is_run, capability_of(grad.device)
    precision = dot_precision(grad.dtype)
    found = pick_channel_gradient_tiles((N, P, Q), kept, is_run, grad.dtype, capability, precision)
    box, block = found.tiles.pixels, found.block
    boxes = box.count(N, P, Q)
    tiles = [-(-size // side) for size, side in zip(kept, block, strict=True)]
    split = pick_split(tiles[0] * tiles[1] * R * S, boxes)
    sums = torch.empty(split, R * S, *kept, dtype=torch.float32, device=grad.device)
    taps, _ = tap_table(geometry, 1, grad.device)
    first = 0
    for number, members in enumerate(list_taps(geometry)):
        args = {
            "dy": dy.describe(0, box, block[0]),
            "x": rows.describe(number, box, block[1]),
            "taps_ptr": taps,
            "sums_ptr": sums,
            "first": first,
            "taps": R * S,
            "tiles_k": tiles[0],
            "tiles_c": tiles[1],
            **dy.args("dy"),
            **rows.args("x"),
            "H": rows.sources[number].shape[1],
            "W": rows.sources[number].shape[2],
            "boxes": boxes,
            "share": -(-boxes // split),
            "N": N,
            "P": P,
            "Q": Q,
        }
        constants = {
            "BLOCK_N": box.images,
            "BLOCK_P": box.rows,
            "BLOCK_Q": box.columns,
            "BLOCK_K": block[0],
            "BLOCK_C": block[1],
            "DY_IS_RUN": dy.is_run,
            "X_IS_RUN": rows.is_run,
            "IS_FAR": is_far(dy.sources[0], box) or is_far(rows.sources[0], box),
            "PRECISION": precision,
        }
        grid = (tiles[0] * tiles[1] * len(members), split)
        Launch(_weight_kernel, grid, args, constants, found.tiles.warps, found.tiles.stages).run()
        first += len(members)
    whole = sums[0] if split == 1 else sums.sum(0)
    return whole.permute(1, 2, 0).reshape(*kept, R, S)


@triton.jit
def _weight_kernel(
    dy,
    x,
    taps_ptr,
    sums_ptr,
    first,
    taps,
    tiles_k,
    tiles_c,
    dy_order_ptr,
    dy_kept,
    stride_dyn,
    stride_dyh,
    stride_dyw,
    stride_dyc,
    x_order_ptr,
    x_kept,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    H,
    W,
    boxes,
    share,
    N,
    P,
    Q,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DY_IS_RUN: tl.constexpr,
    X_IS_RUN: tl.constexpr,
    IS_FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (a tile of filters × channels of a tap of the class; a share of the pixels)."""
    PIXELS: tl.constexpr = BLOCK_N * BLOCK_P * BLOCK_Q
    tile = tl.program_id(0)
    at_c, at_k = tile % tiles_c * BLOCK_C, tile // tiles_c % tiles_k * BLOCK_K
    tap = tl.load(taps_ptr + first + tile // (tiles_c * tiles_k))
    shift_p, shift_q = (tap & 0xFF) - 128, (tap >> 8 & 0xFF) - 128
    boxes_q, boxes_p = tl.cdiv(Q, BLOCK_Q), tl.cdiv(P, BLOCK_P)
    begin = tl.program_id(1) * share
    pixel = tl.arange(0, PIXELS)
    if IS_FAR:
        pixel = pixel.to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for box in range(begin, tl.minimum(begin + share, boxes)):
        q0 = box % boxes_q * BLOCK_Q
        p0 = box // boxes_q % boxes_p * BLOCK_P
        n0 = box // (boxes_q * boxes_p) * BLOCK_N
        n = n0 + pixel // (BLOCK_P * BLOCK_Q)
        p = p0 + pixel // BLOCK_Q % BLOCK_P
        q = q0 + pixel % BLOCK_Q
        if DY_IS_RUN:
            dy_box = dy.load([n0, p0, q0, at_k]).reshape(PIXELS, BLOCK_K)
        else:
            offs = (n - n0) * stride_dyn + (p - p0) * stride_dyh + (q - q0) * stride_dyw
            inside = (n < N) & (p < P) & (q < Q)
            dy_box = gather(
                dy,
                dy_order_ptr,
                at_k,
                dy_kept,
                n0,
                p0,
                q0,
                offs,
                inside,
                stride_dyn,
                stride_dyh,
                stride_dyw,
                stride_dyc,
                BLOCK_K,
            )
        if X_IS_RUN:
            x_box = x.load([n0, p0 + shift_p, q0 + shift_q, at_c]).reshape(PIXELS, BLOCK_C)
        else:
            h, v = p + shift_p, q + shift_q
            offs = (n - n0) * stride_xn + (p - p0) * stride_xh + (q - q0) * stride_xw
            # Beyond the output's edges dy is zero: nothing is read for it.
            inside = (n < N) & (p < P) & (q < Q) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            x_box = gather(
                x,
                x_order_ptr,
                at_c,
                x_kept,
                n0,
                p0 + shift_p,
                q0 + shift_q,
                offs,
                inside,
                stride_xn,
                stride_xh,
                stride_xw,
                stride_xc,
                BLOCK_C,
            )
        acc = tl.dot(dy_box.T, x_box, acc, input_precision=PRECISION)
    k, c = at_k + tl.arange(0, BLOCK_K), at_c + tl.arange(0, BLOCK_C)
    slot = (tl.program_id(1).to(tl.int64) * taps + (tap >> 16)) * dy_kept
    offs = (slot + k)[:, None] * x_kept + c[None, :]
    tl.store(sums_ptr + offs, acc, mask=(k < dy_kept)[:, None] & (c < x_kept)[None, :])
