"""How does a block-sparse convolution run? As products of pixel tiles with the kept blocks, summed by lists.

    y[m, o] = Σ over the entries (shift, i, v) of output block o:  x[m + shift, i] · w[v]

One program owns a box of output pixels × one output block and keeps its float32 sums in registers. For each
kept block it loads the box, shifted by the block's tap, and the block's weights, both by descriptors: a shift
is a coordinate, and what lies beyond the image reads as zero, which is the padding. No pixel is copied first.
The input's gradient is the same kernel on the lists of the transposed weight. Where the stride is 2, the
forward pass reads one of four classes of pixels for each tap, and the gradient writes one (taps.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._triton.block_lists import BlockLists
from vpns_kernels.ops._triton.boxes import as_boxes, is_by_address, load_block, load_box
from vpns_kernels.ops._triton.epilogue import Epilogue, finish
from vpns_kernels.ops._triton.launch import Launch, dot_precision, product_capability
from vpns_kernels.ops._triton.rows import as_rows, is_far, split_classes
from vpns_kernels.ops._triton.tiles import pick_tiles

# Descriptors that the kernel has room for: the classes of a stride of 2.
_MOST_CLASSES = 4


@dataclass(frozen=True)
class BlockWeight:
    """Blocks [bk, bc] where kernels find them.

    Args:
        blocks: [count, bk, bc], a block by its number; or [R · S, K, C], the number being the tap.
        block: bk, bc.
        is_packed: which of the two.
    """

    blocks: Tensor
    block: Pair
    is_packed: bool


def convolve(
    x: Tensor, weight: BlockWeight, lists: BlockLists, geometry: ConvGeometry, y: Tensor, epilogue: Epilogue
) -> None:
    """Write y [N, K, P, Q], channels_last, from x [N, C, H, W] in the dtype of the weight."""
    sources = split_classes(as_rows(x, geometry.stride), geometry.stride)
    _start(sources, weight, lists, y, (1, 1), False, epilogue)


def input_gradient(
    grad: Tensor, weight: BlockWeight, lists: BlockLists, geometry: ConvGeometry, grad_x: Tensor
) -> None:
    """Write grad_x [N, C, H, W], channels_last, from grad [N, K, P, Q]; the lists are the transposed ones."""
    _start([as_rows(grad)], weight, lists, grad_x, geometry.stride, True, Epilogue())


def _start(
    sources: list[Tensor],
    weight: BlockWeight,
    lists: BlockLists,
    target: Tensor,
    steps: Pair,
    is_transposed: bool,
    epilogue: Epilogue,
) -> None:
    """The kernel over the target's pixels; those of a class are `steps` apart."""
    N, K, P, Q = target.shape
    bk, bc = weight.block
    block = (bc, bk) if is_transposed else (bk, bc)
    if target.numel() == 0:
        return
    sizes = (N, -(-P // steps[0]), -(-Q // steps[1]))
    dtype = sources[0].dtype
    capability = product_capability(target.device, dtype)
    tiles = pick_tiles(sizes, block, dtype, capability, dot_precision(dtype), len(sources))
    box = tiles.pixels
    boxes = [as_boxes(x, (box.images, box.rows, box.columns, block[1]), capability) for x in sources]
    args = {f"x_{i}": boxes[min(i, len(boxes) - 1)] for i in range(_MOST_CLASSES)}
    args |= {
        "w": as_boxes(weight.blocks, (1, *weight.block), capability),
        "y_ptr": target,
        **epilogue.pointers(target),
        "starts_ptr": lists.starts,
        "entries_ptr": lists.entries,
        "order_ptr": lists.order,
        "outputs": lists.order.numel(),
        "N": N,
        "P": P,
        "Q": Q,
        "K": K,
    }
    written_rows = target.permute(0, 2, 3, 1)[:, :: steps[0], :: steps[1]]
    constants = {
        "READ_CLASSES": len(sources),
        "STEP_P": steps[0],
        "STEP_Q": steps[1],
        "BLOCK_N": box.images,
        "BLOCK_P": box.rows,
        "BLOCK_Q": box.columns,
        "BLOCK_OUT": block[0],
        "BLOCK_IN": block[1],
        "IS_TRANSPOSED": is_transposed,
        "IS_PACKED": weight.is_packed,
        "BY_ADDRESS": is_by_address(capability),
        "IS_FAR": is_far(written_rows, box),
        **epilogue.constants,
        "PRECISION": dot_precision(dtype),
    }
    grid = (box.count(*sizes) * lists.order.numel(), steps[0] * steps[1])
    Launch(_convolve_kernel, grid, args, constants, tiles.warps, tiles.stages).run()


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
    starts_ptr,
    entries_ptr,
    order_ptr,
    outputs,
    N,
    P,
    Q,
    K,
    READ_CLASSES: tl.constexpr,
    STEP_P: tl.constexpr,
    STEP_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    IS_FAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (pixel box × output block, the latter inside and longest first; class of pixels written)."""
    PIXELS: tl.constexpr = BLOCK_N * BLOCK_P * BLOCK_Q
    LISTS: tl.constexpr = READ_CLASSES * STEP_P * STEP_Q + 1
    phase_p, phase_q = tl.program_id(1) // STEP_Q, tl.program_id(1) % STEP_Q
    rows, columns = tl.cdiv(P - phase_p, STEP_P), tl.cdiv(Q - phase_q, STEP_Q)
    rank = tl.program_id(0) % outputs
    out = tl.load(order_ptr + rank)
    box = tl.program_id(0) // outputs
    # Boxes are counted as for the first class, the largest.
    boxes_q, boxes_p = tl.cdiv(tl.cdiv(Q, STEP_Q), BLOCK_Q), tl.cdiv(tl.cdiv(P, STEP_P), BLOCK_P)
    q0 = box % boxes_q * BLOCK_Q
    p0 = box // boxes_q % boxes_p * BLOCK_P
    n0 = box // (boxes_q * boxes_p) * BLOCK_N

    acc = tl.zeros((PIXELS, BLOCK_OUT), dtype=tl.float32)
    sources = (x_0, x_1, x_2, x_3)
    for cls in tl.static_range(READ_CLASSES):
        list_ptr = starts_ptr + rank * LISTS + cls + tl.program_id(1)
        begin, end = tl.load(list_ptr), tl.load(list_ptr + 1)
        # One ahead: a load whose place another load of the same round tells would not be under way early.
        entry = tl.load(entries_ptr + begin)
        for i in range(begin, end):
            following = tl.load(entries_ptr + i + 1)
            shift_p, shift_q = (entry & 0xFF).to(tl.int32) - 128, (entry >> 8 & 0xFF).to(tl.int32) - 128
            channels = (entry >> 16 & 0xFFFF).to(tl.int32)
            value = (entry >> 32).to(tl.int32)
            x = load_box(
                sources[cls],
                n0,
                p0 + shift_p,
                q0 + shift_q,
                channels * BLOCK_IN,
                BLOCK_N,
                BLOCK_P,
                BLOCK_Q,
                BLOCK_IN,
                BY_ADDRESS,
            )
            # Of a packed weight an entry names the block itself.
            at_out, at_in = (0, 0) if IS_PACKED else (out * BLOCK_OUT, channels * BLOCK_IN)
            if IS_TRANSPOSED:
                block = load_block(w, value, at_in, at_out, BLOCK_IN, BLOCK_OUT, BY_ADDRESS)
                acc = tl.dot(x, block, acc, input_precision=PRECISION)
            else:
                block = load_block(w, value, at_out, at_in, BLOCK_OUT, BLOCK_IN, BY_ADDRESS)
                acc = tl.dot(x, block.T, acc, input_precision=PRECISION)
            entry = following

    pixel = tl.arange(0, PIXELS)
    if IS_FAR:
        pixel = pixel.to(tl.int64)
    n, p, q = pixel // (BLOCK_P * BLOCK_Q), pixel // BLOCK_Q % BLOCK_P, pixel % BLOCK_Q
    k = out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = ((n0 + n < N) & (p0 + p < rows) & (q0 + q < columns))[:, None] & (k < K)[None, :]
    # Channels_last, without gaps, of y and residual alike; by 32 bits from the box's corner: 64 would spill.
    corner = (n0.to(tl.int64) * P + p0 * STEP_P + phase_p) * Q + q0 * STEP_Q + phase_q
    offs = ((n * P + p * STEP_P) * Q + q * STEP_Q)[:, None] * K + k[None, :]
    y_ptr += corner * K
    residual_ptr += corner * K
    acc = finish(acc, bias_ptr, residual_ptr, k, k < K, offs, mask, HAS_BIAS, HAS_RESIDUAL, ACT)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)
