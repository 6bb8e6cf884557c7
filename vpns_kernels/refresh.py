"""Which units does a mask keep? The largest scores, exactly as many as the density says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.ops.select_threshold import select_threshold
from vpns_kernels.patterns import NM, Pattern


class Refresh(NamedTuple):
    """New unit masks, and what selected them (saved beside the masks)."""

    masks: list[Tensor]
    threshold: float
    ties_kept: int
    kept: int


@torch.no_grad()
def refresh_mask(
    scores: Sequence[Tensor],
    pattern: Pattern,
    density: float,
    rule: Literal["exact", "published"] = "exact",
    backend: str = "auto",
) -> Refresh:
    """Masks that keep the units of largest |score| over all tensors together.

    Args:
        scores: one tensor of unit scores per layer.
        density: kept fraction of the units in (0, 1].
        rule: "exact" keeps round-half-up(density · n) units, among ties the lowest flat index first;
            "published" is the rule of the paper's code: the k = int((1 - density) · n) smallest and all
            that tie with them go.

    Returns:
        Refresh: bool masks of the scores' shapes; threshold is the smallest kept magnitude, or with
            "published" the largest that went, where some of its ties would have stayed.

    Raises:
        ValueError: a density the pattern cannot have, an unknown rule, NaN scores, or no scores at all.
    """
    pattern.check_density(density)
    if rule not in ("exact", "published"):
        raise ValueError(f"refresh_mask: expected rule 'exact' or 'published', got {rule!r}")
    if sum(tensor.numel() for tensor in scores) == 0:
        raise ValueError("refresh_mask: expected at least one score, got none")
    if isinstance(pattern, NM):
        if any(bool(tensor.isnan().any()) for tensor in scores):
            raise ValueError("refresh_mask: expected scores without NaN, got NaN")
        masks = [pattern.keep_largest(tensor) for tensor in scores]
        largest = torch.cat([tensor[mask] for tensor, mask in zip(scores, masks, strict=True)])
        smallest = float(largest.abs().min())
        return Refresh(masks, smallest, 0, largest.numel())
    if rule == "published":
        return _refresh_published(scores, density, backend)
    threshold, ties_kept, kept = select_threshold(scores, density, backend=backend)
    masks, _ = _take(scores, threshold, int(ties_kept))
    return Refresh(masks, float(threshold), int(ties_kept), kept)


def _refresh_published(scores: Sequence[Tensor], density: float, backend: str) -> Refresh:
    total = sum(tensor.numel() for tensor in scores)
    pruned = int((1 - density) * total)
    threshold, ties_kept, _ = select_threshold(scores, kept=total - pruned, backend=backend)
    masks, ties = _take(scores, threshold, int(ties_kept))
    # Ties that straddle the cut all go; otherwise the kept ones of that magnitude stay.
    stays = ties == int(ties_kept)
    if not stays:
        masks, _ = _take(scores, threshold, 0)
    kept = total - pruned - (0 if stays else int(ties_kept))
    return Refresh(masks, float(threshold), ties if stays else 0, kept)


def _take(scores: Sequence[Tensor], threshold: Tensor, ties_kept: int) -> tuple[list[Tensor], int]:
    """Masks of |score| > threshold and the first `ties_kept` that equal it, and how many do."""
    is_plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in scores)
    if is_plain and native.why_not() is None:
        masks = [torch.empty(tensor.shape, dtype=torch.bool) for tensor in scores]
        _, ties = native.library().take_kept(
            [tensor.data_ptr() for tensor in scores],
            [tensor.numel() for tensor in scores],
            [mask.data_ptr() for mask in masks],
            float(threshold),
            ties_kept,
            torch.get_num_threads(),
        )
        return masks, int(ties)
    masks, ties = [], 0
    for tensor in scores:
        magnitude = tensor.detach().abs()
        mask = magnitude > threshold
        equal = magnitude == threshold
        count = int(equal.sum())
        if count <= ties_kept:
            mask |= equal
        else:
            mask |= equal & (equal.flatten().cumsum(0).view_as(equal) <= ties_kept)
        ties_kept -= min(count, ties_kept)
        ties += count
        masks.append(mask)
    return masks, ties
