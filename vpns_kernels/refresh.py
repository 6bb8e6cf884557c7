"""Which units does a mask keep? The largest scores, exactly as many as the density says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vpns_kernels.ops.registry import OPS
from vpns_kernels.ops.select_threshold import count_kept, select_threshold
from vpns_kernels.patterns import NM, Pattern


class Refresh:
    """New unit masks, and what selected them (saved beside the masks).

    A GPU's numbers are read when they are asked for: a training step, which wants the masks alone, need not
    wait for them.
    """

    def __init__(self, masks: list[Tensor], threshold: Tensor, ties_kept: Tensor, kept: Tensor) -> None:
        self.masks = masks
        self._numbers = threshold, ties_kept, kept

    def refuse_nan(self) -> None:
        """ValueError where a score was NaN: those masks mean nothing."""
        if bool(self._numbers[0].isnan()):
            raise ValueError("refresh_mask: expected scores without NaN, got NaN")

    @property
    def threshold(self) -> float:
        """The smallest kept magnitude, or the largest that went; ValueError where a score was NaN."""
        self.refuse_nan()
        return float(self._numbers[0])

    @property
    def ties_kept(self) -> int:
        """How many units whose magnitude is the threshold are kept."""
        return int(self._numbers[1])

    @property
    def kept(self) -> int:
        """How many units are kept in all."""
        return int(self._numbers[2])


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
        ValueError: a density the pattern cannot have, an unknown rule, no scores at all, or NaN scores (of a
            GPU, when the threshold is read).
    """
    pattern.check_density(density)
    if rule not in ("exact", "published"):
        raise ValueError(f"refresh_mask: expected rule 'exact' or 'published', got {rule!r}")
    if sum(tensor.numel() for tensor in scores) == 0:
        raise ValueError("refresh_mask: expected at least one score, got none")
    if isinstance(pattern, NM):
        found = _refresh_groups(scores, pattern)
    else:
        found = _refresh_all(scores, density, rule == "published", backend)
    if scores[0].device.type == "cpu":
        found.refuse_nan()
    return found


def _refresh_groups(scores: Sequence[Tensor], pattern: NM) -> Refresh:
    masks = [pattern.keep_largest(tensor) for tensor in scores]
    pairs = [(mask, tensor) for mask, tensor in zip(masks, scores, strict=True) if tensor.numel() > 0]
    # NaN sorts first, so it is kept, and it is the least of whatever it is among.
    least = torch.stack([tensor.abs().where(mask, float("inf")).min() for mask, tensor in pairs]).min()
    kept = torch.stack([mask.sum() for mask in masks]).sum()
    return Refresh(masks, least, torch.zeros_like(kept), kept)


def _refresh_all(scores: Sequence[Tensor], density: float, is_published: bool, backend: str) -> Refresh:
    total = sum(tensor.numel() for tensor in scores)
    wanted = total - int((1 - density) * total) if is_published else count_kept(density, total)
    plain, selecting = [tensor.detach() for tensor in scores], OPS["select_threshold"]
    if all(tensor.is_contiguous() for tensor in plain) and selecting.resolve(backend, plain, wanted) == "cpu":
        masks, *numbers = selecting.module("cpu").run_with_masks(plain, wanted, is_published)
        return Refresh(masks, *numbers)
    threshold, ties, _ = select_threshold(plain, kept=wanted, backend=backend, refuses_nan=False)
    # As published, ties that straddle the cut all go; otherwise the kept ones of that magnitude stay.
    masks, ties_kept = _take(plain, threshold, ties, all_or_none=is_published)
    return Refresh(masks, threshold, ties_kept, wanted - ties + ties_kept)


def _take(
    scores: Sequence[Tensor], threshold: Tensor, ties_kept: Tensor, all_or_none: bool
) -> tuple[list[Tensor], Tensor]:
    """Masks of |score| > threshold and the first `ties_kept` that equal it, and how many of those stay.

    Args:
        all_or_none: where not all ties would stay, none does.
    """
    triton = OPS["select_threshold"].module("triton")
    if triton.why_not(scores, 1) is None:
        found: tuple[list[Tensor], Tensor] = triton.take_kept(scores, threshold, ties_kept, all_or_none)
        return found
    magnitudes = [tensor.detach().abs() for tensor in scores]
    equal = [magnitude == threshold for magnitude in magnitudes]
    counts = torch.stack([ties.sum() for ties in equal])
    if all_or_none:
        ties_kept = ties_kept.where(counts.sum() == ties_kept, 0)
    room = ties_kept - (counts.cumsum(0) - counts)
    masks = [
        (magnitude > threshold) | (ties & (ties.flatten().cumsum(0).view_as(ties) <= left))
        for magnitude, ties, left in zip(magnitudes, equal, room, strict=True)
    ]
    return masks, ties_kept
