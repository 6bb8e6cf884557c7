"""Triton backend: magnitudes order like their bits without the sign, and four passes settle those 31 bits.

Each pass counts, among the scores that agree with the bits settled so far, how many have each value of the
next eight; then one program finds the value that holds the k-th largest. A program reads one chunk of one
tensor, and a table on the device tells it which, so that one start serves all tensors. Counts are integers,
the same in any order; nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.chunks import chunk_table, pick_tiles
from vpns_kernels.ops._triton.kept_masks import take_kept
from vpns_kernels.ops._triton.launch import Launch

__all__ = ["run", "take_kept", "why_not"]

# The lowest bit of each pass: 31 = 8 + 8 + 8 + 7.
SHIFTS = (23, 15, 7, 0)
BINS = tl.constexpr(256)
_INFINITY = tl.constexpr(0x7F800000)
# What passes leave for one another: settled bits, how many of those that agree are kept, the largest seen.
_PREFIX, _RANK, _LARGEST, _STATE = (tl.constexpr(place) for place in range(4))


def why_not(scores: Sequence[Tensor], kept: int) -> str | None:
    """float32, fewer than 2^31 in all."""
    if any(tensor.dtype != torch.float32 for tensor in scores):
        return f"it takes float32 scores, got {scores[0].dtype}"
    total = sum(tensor.numel() for tensor in scores)
    return None if total < 2**31 else f"it counts in 32 bits, got {total} scores"


def run(scores: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    tiles = pick_tiles()
    dense = [tensor.contiguous() for tensor in scores]
    device = dense[0].device
    chunks = chunk_table(dense, tiles.chunk)
    counts = torch.zeros((len(SHIFTS), BINS.value), dtype=torch.int32, device=device)
    state = torch.zeros(_STATE.value, dtype=torch.int32, device=device)
    threshold = scores[0].new_empty(())
    ties_kept = torch.empty((), dtype=torch.int64, device=device)
    for number, shift in enumerate(SHIFTS):
        bits = 31 - shift if number == 0 else SHIFTS[number - 1] - shift
        constants = {"SHIFT": shift, "BITS": bits}
        args = {"chunks_ptr": chunks, "state_ptr": state, "counts_ptr": counts[number]}
        Launch(
            count_values, (chunks.shape[0],), args, {**constants, "TILE": tiles.tile}, tiles.warps, stages=3
        ).run()
        found = {"threshold_ptr": threshold, "ties_kept_ptr": ties_kept}
        args = {"state_ptr": state, "counts_ptr": counts[number], **found}
        Launch(settle_bits, (1,), {**args, "kept": kept}, constants, warps=4, stages=1).run()
    return threshold, ties_kept


@triton.jit
def count_values(
    chunks_ptr, state_ptr, counts_ptr, SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr
):
    """Of one chunk: how many scores have each value of bits [SHIFT, SHIFT + BITS) where those above agree."""
    chunk = tl.program_id(0).to(tl.int64)
    scores_ptr = tl.load(chunks_ptr + 3 * chunk).to(tl.pointer_type(tl.float32))
    length = tl.load(chunks_ptr + 3 * chunk + 1).to(tl.int32)
    prefix = tl.load(state_ptr + _PREFIX)
    counts = tl.zeros((BINS,), tl.int32)
    largest = tl.zeros((TILE,), tl.int32)
    for start in range(0, length, TILE):
        offs = start + tl.arange(0, TILE)
        mask = offs < length
        score = tl.load(scores_ptr + offs, mask=mask, other=0.0)
        bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        # Two shifts, for one by 31 bits and more is undefined.
        agrees = mask & ((bits >> SHIFT) >> BITS == prefix)
        counts += tl.histogram((bits >> SHIFT) & ((1 << BITS) - 1), BINS, mask=agrees)
        if SHIFT + BITS == 31:
            largest = tl.maximum(largest, bits)
    offs_bin = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + offs_bin, counts, mask=counts > 0, sem="relaxed")
    if SHIFT + BITS == 31:
        tl.atomic_max(state_ptr + _LARGEST, tl.max(largest, 0), sem="relaxed")


@triton.jit
def settle_bits(
    state_ptr, counts_ptr, threshold_ptr, ties_kept_ptr, kept, SHIFT: tl.constexpr, BITS: tl.constexpr
):
    """The value of the bits that the k-th largest has; after the last pass, all that was asked for."""
    if SHIFT + BITS == 31:
        prefix, rank = 0, kept
    else:
        prefix, rank = tl.load(state_ptr + _PREFIX), tl.load(state_ptr + _RANK)
    offs_bin = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + offs_bin)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    is_here = (above < rank) & (rank <= above + counts)
    prefix = (prefix << BITS) + tl.sum(tl.where(is_here, offs_bin, 0), 0)
    rank = rank - tl.sum(tl.where(is_here, above, 0), 0)
    tl.store(state_ptr + _PREFIX, prefix)
    tl.store(state_ptr + _RANK, rank)
    if SHIFT == 0:
        # NaN is above infinity: where one is, the threshold is NaN.
        largest = tl.load(state_ptr + _LARGEST)
        has_nan = largest > _INFINITY
        tl.store(threshold_ptr, tl.where(has_nan, largest, prefix).to(tl.float32, bitcast=True))
        tl.store(ties_kept_ptr, tl.where(has_nan, 0, rank).to(tl.int64))
