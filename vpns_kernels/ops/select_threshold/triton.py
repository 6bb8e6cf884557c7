"""Triton backend: magnitudes order like their bits without the sign, and four passes settle those 31 bits.

Each pass counts, among the numbers that agree with the bits settled so far, how many have each value of the
next eight, and begins by finding the value that holds the k-th largest in what the pass before counted. It
goes over those few scores that a sample leaves in question (_triton/bracket.py); where it left too many, or
not the k-th, over all. Programs read on the device which it is: nothing waits for the host, and the result is
an exact order statistic either way. A table tells each program its chunk of a tensor, so that one start
serves all tensors.

Of 25.5 million scores, 102 MB, an H200 (4.3 TB/s) reads once, 24 µs; then 1 MB to 6 MB four times, from its
cache. Seven starts; before there were eight, of which four read everything: 95 µs for the bytes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.bracket import ABOVE, LARGEST, WITHIN, find_bin, gather_bracket
from vpns_kernels.ops._triton.chunks import chunk_table, pick_tiles
from vpns_kernels.ops._triton.kept_masks import take_kept
from vpns_kernels.ops._triton.launch import Launch

__all__ = ["run", "take_kept", "why_not"]

# The lowest bit of each pass: 31 = 8 + 8 + 8 + 7.
SHIFTS = (23, 15, 7, 0)
BINS = tl.constexpr(256)
# Candidates of a program, an eighth of a chunk: there is room for that share of all scores.
PIECE = 4096
_TILE, _WARPS = 2048, 4
_INFINITY = tl.constexpr(0x7F800000)


def why_not(scores: Sequence[Tensor], kept: int) -> str | None:
    """float32, fewer than 2^31 in all."""
    if any(tensor.dtype != torch.float32 for tensor in scores):
        return f"it takes float32 scores, got {scores[0].dtype}"
    total = sum(tensor.numel() for tensor in scores)
    return None if total < 2**31 else f"it counts in 32 bits, got {total} scores"


def run(scores: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    dense = [tensor.contiguous() for tensor in scores]
    device = dense[0].device
    chunks = chunk_table(dense, pick_tiles().chunk)
    capacity = chunks.shape[0] * PIECE
    counts = torch.empty((len(SHIFTS), BINS.value), dtype=torch.int32, device=device)
    # The bits settled before each pass, and how many of those that agree are kept.
    settled = torch.empty((len(SHIFTS), 2), dtype=torch.int32, device=device)
    state, candidates = gather_bracket(dense, chunks, kept, counts, capacity)
    threshold = scores[0].new_empty(())
    ties_kept = torch.empty((), dtype=torch.int64, device=device)
    known = {"state_ptr": state, "counts_ptr": counts, "settled_ptr": settled, "kept": kept}
    known["capacity"] = capacity
    bits = 0
    for number, shift in enumerate(SHIFTS):
        before, bits = bits, 31 - shift if number == 0 else SHIFTS[number - 1] - shift
        args = {"chunks_ptr": chunks, "candidates_ptr": candidates, **known}
        constants = {"PASS": number, "SHIFT": shift, "BITS": bits, "BITS_BEFORE": before}
        constants |= {"PIECE": PIECE, "TILE": _TILE}
        Launch(count_values, (chunks.shape[0],), args, constants, _WARPS, stages=3).run()
    args = {**known, "threshold_ptr": threshold, "ties_kept_ptr": ties_kept}
    constants = {"PASSES": len(SHIFTS), "BITS_BEFORE": bits}
    Launch(write_threshold, (1,), args, constants, warps=4, stages=1).run()
    return threshold, ties_kept


@triton.jit
def _are_few(state_ptr, kept, capacity):
    """Whether the k-th is among the candidates, and there was room for all of them."""
    above, within = tl.load(state_ptr + ABOVE), tl.load(state_ptr + WITHIN)
    return (above < kept) & (kept <= above + within) & (within <= capacity)


@triton.jit
def _settle(state_ptr, counts_ptr, settled_ptr, kept, are_few, PASS: tl.constexpr, BITS_BEFORE: tl.constexpr):
    """(bits of the k-th largest that are known before a pass, its rank among what agrees with them)."""
    if PASS == 0:
        return 0, tl.where(are_few, kept - tl.load(state_ptr + ABOVE), kept)
    else:
        BEFORE: tl.constexpr = PASS - 1
        prefix, rank = tl.load(settled_ptr + 2 * BEFORE), tl.load(settled_ptr + 2 * BEFORE + 1)
        counts = tl.load(counts_ptr + BEFORE * BINS + tl.arange(0, BINS))
        value, within = find_bin(counts, rank, BINS)
        return (prefix << BITS_BEFORE) + value, within


@triton.jit
def count_values(
    chunks_ptr,
    candidates_ptr,
    state_ptr,
    counts_ptr,
    settled_ptr,
    kept,
    capacity,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BITS_BEFORE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count, in a piece of the candidates or a chunk of the scores, how many that agree have each value."""
    chunk = tl.program_id(0).to(tl.int64)
    are_few = _are_few(state_ptr, kept, capacity)
    piece = candidates_ptr.to(tl.int64) + chunk * (4 * PIECE)
    address = tl.where(are_few, piece, tl.load(chunks_ptr + 3 * chunk))
    left = tl.minimum(tl.load(state_ptr + WITHIN) - chunk * PIECE, PIECE)
    length = tl.where(are_few, left, tl.load(chunks_ptr + 3 * chunk + 1)).to(tl.int32)
    if length > 0:
        prefix, rank = _settle(state_ptr, counts_ptr, settled_ptr, kept, are_few, PASS, BITS_BEFORE)
        # The first program always has something to read.
        if chunk == 0:
            tl.store(settled_ptr + 2 * PASS, prefix)
            tl.store(settled_ptr + 2 * PASS + 1, rank)
        scores_ptr = address.to(tl.pointer_type(tl.float32))
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            score = tl.load(scores_ptr + offs, mask=offs < length, other=0.0)
            bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            # Two shifts, for one by 31 bits and more is undefined.
            agrees = (offs < length) & ((bits >> SHIFT) >> BITS == prefix)
            counts += tl.histogram((bits >> SHIFT) & ((1 << BITS) - 1), BINS, mask=agrees)
        tl.atomic_add(counts_ptr + PASS * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def write_threshold(
    state_ptr,
    counts_ptr,
    settled_ptr,
    kept,
    capacity,
    threshold_ptr,
    ties_kept_ptr,
    PASSES: tl.constexpr,
    BITS_BEFORE: tl.constexpr,
):
    """All bits of the k-th largest, and its rank among its equals."""
    are_few = _are_few(state_ptr, kept, capacity)
    bits, rank = _settle(state_ptr, counts_ptr, settled_ptr, kept, are_few, PASSES, BITS_BEFORE)
    # NaN is above infinity: where one is, the threshold is NaN.
    largest = tl.load(state_ptr + LARGEST)
    has_nan = largest > _INFINITY
    tl.store(threshold_ptr, tl.where(has_nan, largest, bits).to(tl.float32, bitcast=True))
    tl.store(ties_kept_ptr, tl.where(has_nan, 0, rank).to(tl.int64))
