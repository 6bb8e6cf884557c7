"""Which scores stay? Those above the threshold, and of its ties the first few, without asking the host.

A tie stays where fewer than `ties_kept` come before it. One kernel counts the ties of each chunk; the counts
before a chunk are their prefix sum, those before a score within its chunk a prefix sum of the tile; a second
kernel writes the masks. Scores are read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpns_kernels.ops._triton.chunks import chunk_table, pick_tiles
from vpns_kernels.ops._triton.launch import Launch


def take_kept(
    scores: Sequence[Tensor], threshold: Tensor, ties_kept: Tensor, all_or_none: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Masks of |score| > threshold and of the first `ties_kept` that equal it, in the order of flat indices.

    Args:
        scores: float32, fewer than 2^31 in all, at least one.
        threshold, ties_kept: 0-dim, of the scores' device.
        all_or_none: where not all ties would stay, none does.

    Returns:
        The masks, bool, in the scores' shapes, and how many ties stay, a 0-dim int64 tensor.
    """
    tiles, dense = pick_tiles(), [tensor.detach().contiguous() for tensor in scores]
    chunks = chunk_table(dense, tiles.chunk)
    grid, constants = (chunks.shape[0],), {"TILE": tiles.tile}
    counts = torch.empty(chunks.shape[0], dtype=torch.int64, device=chunks.device)
    args = {"chunks_ptr": chunks, "threshold_ptr": threshold, "counts_ptr": counts}
    Launch(count_ties, grid, args, constants, tiles.warps, stages=3).run()
    until = counts.cumsum(0)
    stay = ties_kept.where(until[-1] == ties_kept, 0) if all_or_none else ties_kept
    room = stay - (until - counts)
    sizes = [tensor.numel() for tensor in dense]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=chunks.device)
    args = {"chunks_ptr": chunks, "threshold_ptr": threshold, "room_ptr": room, "masks_ptr": flat}
    Launch(write_masks, grid, args, constants, tiles.warps, stages=3).run()
    parts = zip(flat.view(torch.bool).split(sizes), scores, strict=True)
    return [mask.view(tensor.shape) for mask, tensor in parts], stay


@triton.jit
def count_ties(chunks_ptr, threshold_ptr, counts_ptr, TILE: tl.constexpr):
    """Count the scores of one chunk that have the threshold's magnitude."""
    chunk = tl.program_id(0).to(tl.int64)
    scores_ptr = tl.load(chunks_ptr + 3 * chunk).to(tl.pointer_type(tl.float32))
    length = tl.load(chunks_ptr + 3 * chunk + 1).to(tl.int32)
    threshold = tl.load(threshold_ptr)
    ties = tl.zeros((TILE,), tl.int32)
    for start in range(0, length, TILE):
        offs = start + tl.arange(0, TILE)
        # A score that is not there is NaN, which equals nothing.
        score = tl.load(scores_ptr + offs, mask=offs < length, other=float("nan"))
        ties += (tl.abs(score) == threshold).to(tl.int32)
    tl.store(counts_ptr + chunk, tl.sum(ties, 0).to(tl.int64))


@triton.jit
def write_masks(chunks_ptr, threshold_ptr, room_ptr, masks_ptr, TILE: tl.constexpr):
    """The mask of one chunk; `room` is how many of its ties stay, less than one where none does."""
    chunk = tl.program_id(0).to(tl.int64)
    scores_ptr = tl.load(chunks_ptr + 3 * chunk).to(tl.pointer_type(tl.float32))
    length = tl.load(chunks_ptr + 3 * chunk + 1).to(tl.int32)
    place = tl.load(chunks_ptr + 3 * chunk + 2)
    threshold, room = tl.load(threshold_ptr), tl.load(room_ptr + chunk)
    for start in range(0, length, TILE):
        offs = start + tl.arange(0, TILE)
        mask = offs < length
        magnitude = tl.abs(tl.load(scores_ptr + offs, mask=mask, other=float("nan")))
        tie = (magnitude == threshold).to(tl.int32)
        kept = (magnitude > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= room))
        tl.store(masks_ptr + place + offs, kept.to(tl.uint8), mask=mask)
        room -= tl.sum(tie, 0)
