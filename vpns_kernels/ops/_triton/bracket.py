"""Which scores can be the k-th largest? Those between two values that a sample tells, almost surely.

The ranks of the k-th among a sample of M, p · M give or take a few deviations √(M · p · (1 - p)), are cut to
their upper 16 bits: a bracket that holds a few hundredths of the scores. One pass over all counts those above
it and copies those within, in whatever order programs come. The sample decides how much is left to do, never
the result: whether the k-th is in the bracket is known from the counts, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.chunks import sample_table
from vpns_kernels.ops._triton.launch import Launch

SAMPLES = 8192
# A thread has eight samples at a time; of all scores sixteen, which are as many loads under way.
_SAMPLE_TILE, _COLUMNS, _WARPS = 4096, 16, 8
# Deviations on either side, and a rank or two where the sample knows nothing: missed once in a million.
_DEVIATIONS, _SPARE = 5.0, 2.0
# What passes leave for one another: the bracket, how many scores are above and within, the largest.
LOW, HIGH, ABOVE, WITHIN, LARGEST, SIZE = (tl.constexpr(place) for place in range(6))
# Magnitudes are 31 bits: the exponent's 8, then 8 and 15 of the fraction.
_MOST = tl.constexpr(0x7FFFFFFF)
_BINS = tl.constexpr(256)
_CUT, _BELOW_CUT = tl.constexpr(15), tl.constexpr(0x7FFF)


def sample_ranks(kept: int, total: int) -> tuple[int, int]:
    """Ranks from the top of the sample between which the k-th of all lies; 0 and SAMPLES + 1: its ends."""
    share = kept / total
    reach = _DEVIATIONS * math.sqrt(SAMPLES * share * (1 - share)) + _SPARE
    return max(0, math.floor(SAMPLES * share - reach)), min(SAMPLES + 1, math.ceil(SAMPLES * share + reach))


def gather_bracket(
    scores: Sequence[Tensor], chunks: Tensor, kept: int, counts: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """(state int32 [SIZE], candidates float32 [capacity]): those within the bracket, the first `capacity`.

    Args:
        scores: contiguous, float32.
        chunks: their table.
        counts: int32 of later passes; zeros are written there.
    """
    device = scores[0].device
    state = torch.empty(SIZE.value, dtype=torch.int32, device=device)
    candidates = torch.empty(capacity, dtype=torch.float32, device=device)
    upper, lower = sample_ranks(kept, sum(tensor.numel() for tensor in scores))
    args: dict[str, Tensor | int] = {"samples_ptr": sample_table(scores, SAMPLES), "state_ptr": state}
    args |= {"counts_ptr": counts, "upper": upper, "lower": lower}
    constants = {"SAMPLES": SAMPLES, "COUNTS": counts.numel(), "TILE": _SAMPLE_TILE}
    Launch(choose_bracket, (1,), args, constants, warps=16, stages=1).run()
    args = {"chunks_ptr": chunks, "state_ptr": state, "candidates_ptr": candidates, "capacity": capacity}
    constants = {"ROWS": 32 * _WARPS, "COLUMNS": _COLUMNS}
    Launch(take_within, (chunks.shape[0],), args, constants, _WARPS, stages=1).run()
    return state, candidates


@triton.jit
def find_bin(counts, rank, BINS: tl.constexpr):
    """(the bin that holds the rank-th from the top, the rank within it)."""
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    is_here = (above < rank) & (rank <= above + counts)
    found = tl.sum(tl.where(is_here, tl.arange(0, BINS), 0), 0)
    return found, rank - tl.sum(tl.where(is_here, above, 0), 0)


@triton.jit
def _sampled_bits(samples_ptr, offs):
    scores_ptr = tl.load(samples_ptr + offs).to(tl.pointer_type(tl.float32))
    return tl.load(scores_ptr).to(tl.int32, bitcast=True) & _MOST


@triton.jit
def choose_bracket(
    samples_ptr,  # [SAMPLES], addresses
    state_ptr,
    counts_ptr,
    upper,
    lower,
    SAMPLES: tl.constexpr,
    COUNTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the bracket, and zeros where later passes count."""
    offs_count = tl.arange(0, COUNTS)
    tl.store(counts_ptr + offs_count, tl.zeros((COUNTS,), tl.int32))
    offs = tl.arange(0, TILE)
    exponents = tl.zeros((_BINS,), tl.int32)
    for first in range(0, SAMPLES, TILE):
        exponents += tl.histogram(_sampled_bits(samples_ptr, first + offs) >> 23, _BINS)
    high, upper_within = find_bin(exponents, upper, _BINS)
    low, lower_within = find_bin(exponents, lower, _BINS)
    of_high, of_low = tl.zeros((_BINS,), tl.int32), tl.zeros((_BINS,), tl.int32)
    for first in range(0, SAMPLES, TILE):
        bits = _sampled_bits(samples_ptr, first + offs)
        fraction = (bits >> _CUT) & (_BINS - 1)
        of_high += tl.histogram(fraction, _BINS, mask=(bits >> 23) == high)
        of_low += tl.histogram(fraction, _BINS, mask=(bits >> 23) == low)
    upper_fraction, _ = find_bin(of_high, upper_within, _BINS)
    lower_fraction, _ = find_bin(of_low, lower_within, _BINS)
    high = ((high * _BINS + upper_fraction) << _CUT) | _BELOW_CUT
    low = (low * _BINS + lower_fraction) << _CUT
    # Beyond the ends of the sample anything may lie.
    tl.store(state_ptr + HIGH, tl.where(upper < 1, _MOST, high))
    tl.store(state_ptr + LOW, tl.where(lower > SAMPLES, 0, low))
    tl.store(state_ptr + ABOVE, 0)
    tl.store(state_ptr + WITHIN, 0)
    tl.store(state_ptr + LARGEST, 0)


@triton.jit
def take_within(chunks_ptr, state_ptr, candidates_ptr, capacity, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Count one chunk's scores above the bracket, find the largest, and copy those within.

    A thread has one row of a tile [ROWS, COLUMNS], whose rows are neighbours in memory: it sums along its
    columns alone, and one sum of each thread takes part in what all threads add up.
    """
    chunk = tl.program_id(0).to(tl.int64)
    scores_ptr = tl.load(chunks_ptr + 3 * chunk).to(tl.pointer_type(tl.float32))
    length = tl.load(chunks_ptr + 3 * chunk + 1).to(tl.int32)
    low, high = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH)
    above, largest = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    tile = tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :] * ROWS
    for start in range(0, length, ROWS * COLUMNS):
        offs = start + tile
        # What is not there counts as zero, which is above nothing.
        score = tl.load(scores_ptr + offs, mask=offs < length, other=0.0)
        bits = score.to(tl.int32, bitcast=True) & _MOST
        above += tl.sum((bits > high).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(bits, 1))
        is_within = (offs < length) & (bits >= low) & (bits <= high)
        flags = is_within.to(tl.int32)
        rows = tl.sum(flags, 1)
        first = tl.atomic_add(state_ptr + WITHIN, tl.sum(rows, 0), sem="relaxed")
        before = first + tl.cumsum(rows, 0) - rows
        place = before[:, None] + tl.cumsum(flags, 1) - flags
        # Beyond what there is room for they are counted alone; the count tells.
        tl.store(candidates_ptr + place, score, mask=is_within & (place < capacity))
    tl.atomic_add(state_ptr + ABOVE, tl.sum(above, 0), sem="relaxed")
    tl.atomic_max(state_ptr + LARGEST, tl.max(largest, 0), sem="relaxed")
