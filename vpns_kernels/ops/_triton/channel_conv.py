"""How does a channel-pruned convolution run? As products of gathered pixels with the small dense weight.

    y[m, outputs[o]] = Σ over taps and kept inputs i:  x[m + shift, inputs[i]] · w[tap, o, i]

One program owns a box of output pixels × a tile of output channels and keeps its float32 sums in registers.
For each tap and run of kept inputs it reads the shifted box's channels through their list (where they lie
side by side, by descriptor) and the weights by descriptor. It stores through the list of outputs, in which
those that are not kept come last: their sums are zero, and what follows the sums is theirs too. So each
output is written once, and nothing is gathered or scattered in memory first. The input's gradient is the same
kernel with lists and weight the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton.channel_lists import ChannelList
from vpns_kernels.ops._triton.channel_rows import ChannelRows, gather
from vpns_kernels.ops._triton.channel_tiles import pick_channel_tiles
from vpns_kernels.ops._triton.epilogue import Epilogue, finish
from vpns_kernels.ops._triton.launch import Launch, capability_of, describe, dot_precision
from vpns_kernels.ops._triton.rows import is_far
from vpns_kernels.ops._triton.taps import tap_table

# Sources that the kernel has room for: the classes of a stride of 2.
_MOST_CLASSES = 4


def convolve(
    x: Tensor,
    weight: Tensor,
    inputs: ChannelList,
    outputs: ChannelList,
    geometry: ConvGeometry,
    y: Tensor,
    epilogue: Epilogue,
) -> None:
    """Write y [N, K, P, Q], channels_last, from x [N, C, H, W] in the dtype of the weight.

    Args:
        weight: [R · S, kept K, kept C], as `filters` makes it.
    """
    rows = ChannelRows.of(x, inputs, geometry.stride)
    _start(rows, x.shape[2:], weight, outputs, geometry, y, False, epilogue)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    inputs: ChannelList,
    outputs: ChannelList,
    geometry: ConvGeometry,
    grad_x: Tensor,
) -> None:
    """Write grad_x [N, C, H, W], channels_last, from grad [N, K, P, Q]: zero where inputs are not kept."""
    rows = ChannelRows.of(grad, outputs)
    _start(rows, grad.shape[2:], weight, inputs, geometry, grad_x, True, Epilogue())


def _start(
    rows: ChannelRows,
    size: Sequence[int],
    weight: Tensor,
    written: ChannelList,
    geometry: ConvGeometry,
    target: Tensor,
    is_transposed: bool,
    epilogue: Epilogue,
) -> None:
    """The kernel over the target's pixels; those of a class are a stride apart where it is transposed."""
    N, K, P, Q = target.shape
    if target.numel() == 0:
        return
    reads: Pair = (1, 1) if is_transposed else geometry.stride
    steps: Pair = geometry.stride if is_transposed else (1, 1)
    sizes = (N, -(-P // steps[0]), -(-Q // steps[1]))
    dtype, kept = weight.dtype, (written.most_kept, rows.channels.most_kept)
    found = pick_channel_tiles(
        sizes, kept, rows.is_run, dtype, capability_of(target.device), dot_precision(dtype)
    )
    box, block = found.tiles.pixels, found.block
    classes = len(rows.sources)
    # Of a class.
    written_rows = target.permute(0, 2, 3, 1)[:, :: steps[0], :: steps[1]]
    taps, ends = tap_table(geometry, -1 if is_transposed else 1, target.device)
    args = {f"x_{i}": rows.describe(min(i, classes - 1), box, block[1]) for i in range(_MOST_CLASSES)}
    args |= {
        "w": describe(weight, (1, *(block[::-1] if is_transposed else block))),
        "y_ptr": target,
        **epilogue.pointers(target),
        "taps_ptr": taps,
        "ends_ptr": ends,
        **rows.args("x"),
        "H": size[0],
        "W": size[1],
        "y_order_ptr": written.order,
        "y_kept": written.kept,
        "N": N,
        "P": P,
        "Q": Q,
        "K": K,
    }
    constants = {
        "READ_P": reads[0],
        "READ_Q": reads[1],
        "STEP_P": steps[0],
        "STEP_Q": steps[1],
        "BLOCK_N": box.images,
        "BLOCK_P": box.rows,
        "BLOCK_Q": box.columns,
        "BLOCK_OUT": block[0],
        "BLOCK_IN": block[1],
        "IS_TRANSPOSED": is_transposed,
        "IS_RUN": rows.is_run,
        "IS_FAR": is_far(rows.sources[0], box) or is_far(written_rows, box),
        "IS_WHOLE": written.is_whole,
        "COUNTS_X": isinstance(rows.channels.kept, Tensor),
        "COUNTS_Y": isinstance(written.kept, Tensor),
        **epilogue.constants,
        "PRECISION": dot_precision(dtype),
    }
    grid = (box.count(*sizes) * -(-K // block[0]), steps[0] * steps[1])
    Launch(_convolve_kernel, grid, args, constants, found.tiles.warps, found.tiles.stages).run()


@triton.jit
def _convolve_kernel(
    x_0,
    x_1,
    x_2,
    x_3,
    w,
    y_ptr,
    bias_ptr,
    residual_ptr,
    taps_ptr,
    ends_ptr,
    x_order_ptr,
    x_kept,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    H,
    W,
    y_order_ptr,
    y_kept,
    N,
    P,
    Q,
    K,
    READ_P: tl.constexpr,
    READ_Q: tl.constexpr,
    STEP_P: tl.constexpr,
    STEP_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_RUN: tl.constexpr,
    IS_FAR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    COUNTS_X: tl.constexpr,
    COUNTS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (pixel box × tile of output channels, the latter inside; class of pixels written)."""
    PIXELS: tl.constexpr = BLOCK_N * BLOCK_P * BLOCK_Q
    phase_p, phase_q = tl.program_id(1) // STEP_Q, tl.program_id(1) % STEP_Q
    rows, columns = tl.cdiv(P - phase_p, STEP_P), tl.cdiv(Q - phase_q, STEP_Q)
    tiles = tl.cdiv(K, BLOCK_OUT)
    out = tl.program_id(0) % tiles * BLOCK_OUT
    box = tl.program_id(0) // tiles
    # Boxes are counted as for the first class, the largest.
    boxes_q, boxes_p = tl.cdiv(tl.cdiv(Q, STEP_Q), BLOCK_Q), tl.cdiv(tl.cdiv(P, STEP_P), BLOCK_P)
    q0 = box % boxes_q * BLOCK_Q
    p0 = box // boxes_q % boxes_p * BLOCK_P
    n0 = box // (boxes_q * boxes_p) * BLOCK_N
    pixel = tl.arange(0, PIXELS)
    if IS_FAR:
        pixel = pixel.to(tl.int64)
    n = n0 + pixel // (BLOCK_P * BLOCK_Q)
    p = p0 + pixel // BLOCK_Q % BLOCK_P
    q = q0 + pixel % BLOCK_Q

    if COUNTS_X:
        x_kept = tl.load(x_kept)
    if COUNTS_Y:
        y_kept = tl.load(y_kept)
    # Nothing is summed where none of the outputs is kept.
    chunks = tl.where(out < y_kept, tl.cdiv(x_kept, BLOCK_IN), 0)
    acc = tl.zeros((PIXELS, BLOCK_OUT), dtype=tl.float32)
    sources = (x_0, x_1, x_2, x_3)
    offs_x = (n - n0) * stride_xn + (p - p0) * stride_xh + (q - q0) * stride_xw
    for cls in tl.static_range(READ_P * READ_Q):
        number = cls + tl.program_id(1)
        begin = tl.load(ends_ptr + number - 1, mask=number > 0, other=0)
        taps = tl.load(ends_ptr + number) - begin
        class_h, class_w = tl.cdiv(H - cls // READ_Q, READ_P), tl.cdiv(W - cls % READ_Q, READ_Q)
        # One ahead: a load whose place another load of the same round tells would not be under way early.
        tap = tl.load(taps_ptr + begin, mask=taps > 0, other=0)
        for i in range(0, taps * chunks):
            following = tl.load(taps_ptr + begin + (i + 1) % taps)
            shift_p, shift_q = (tap & 0xFF) - 128, (tap >> 8 & 0xFF) - 128
            at = i // taps * BLOCK_IN
            if IS_RUN:
                x = sources[cls].load([n0, p0 + shift_p, q0 + shift_q, at])
                x = x.reshape(PIXELS, BLOCK_IN)
            else:
                h, v = p + shift_p, q + shift_q
                inside = (n < N) & (h >= 0) & (h < class_h) & (v >= 0) & (v < class_w)
                x = gather(
                    sources[cls],
                    x_order_ptr,
                    at,
                    x_kept,
                    n0,
                    p0 + shift_p,
                    q0 + shift_q,
                    offs_x,
                    inside,
                    stride_xn,
                    stride_xh,
                    stride_xw,
                    stride_xc,
                    BLOCK_IN,
                )
            if IS_TRANSPOSED:
                block = w.load([tap >> 16, at, out]).reshape(BLOCK_IN, BLOCK_OUT)
            else:
                block = w.load([tap >> 16, out, at]).reshape(BLOCK_OUT, BLOCK_IN).T
            acc = tl.dot(x, block, acc, input_precision=PRECISION)
            tap = following

    place = out + tl.arange(0, BLOCK_OUT)
    if COUNTS_Y:
        # Of a mask, the weight has filters that are not kept too.
        acc = tl.where((place < y_kept)[None, :], acc, 0.0)
    k = place if IS_WHOLE else tl.load(y_order_ptr + place, mask=place < K, other=0)
    mask = ((n < N) & (p < rows) & (q < columns))[:, None] & (place < K)[None, :]
    # Channels_last, without gaps, of y and residual alike; by 32 bits from a corner, as what is gathered.
    corner = (n0.to(tl.int64) * P + p0 * STEP_P + phase_p) * Q + q0 * STEP_Q + phase_q
    offs = (((n - n0) * P + (p - p0) * STEP_P) * Q + (q - q0) * STEP_Q)[:, None] * K + k[None, :]
    y_ptr += corner * K
    residual_ptr += corner * K
    acc = finish(acc, bias_ptr, residual_ptr, k, place < K, offs, mask, HAS_BIAS, HAS_RESIDUAL, ACT)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)
