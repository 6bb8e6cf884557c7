"""CPU backend: csrc/cpu/select_threshold.cpp, which reads the scores once and can write the masks as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels import native


def why_not(scores: Sequence[Tensor], kept: int) -> str | None:
    """float32 on the CPU, and the compiled library."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in scores):
        return f"it takes float32 CPU scores, got {scores[0].dtype} on {scores[0].device}"
    return native.why_not()


def run(scores: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    # The order of memory does not matter to a selection, only that every entry is seen once.
    dense = [tensor if _is_dense(tensor) else tensor.contiguous() for tensor in scores]
    threshold, ties_kept, _ = native.library().select_threshold(
        [tensor.data_ptr() for tensor in dense],
        [tensor.numel() for tensor in dense],
        kept,
        torch.get_num_threads(),
    )
    return scores[0].new_tensor(threshold), torch.tensor(ties_kept, dtype=torch.int64, device="cpu")


def run_with_masks(
    scores: Sequence[Tensor], kept: int, all_ties_or_none: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Bool masks, threshold, ties that are kept, entries that are kept; of contiguous scores, in one pass.

    Args:
        all_ties_or_none: where not all that equal the threshold are among the kept, none is.
    """
    masks = [torch.empty(tensor.shape, dtype=torch.bool, device="cpu") for tensor in scores]
    threshold, ties_kept, counted = native.library().select_threshold(
        [tensor.data_ptr() for tensor in scores],
        [tensor.numel() for tensor in scores],
        kept,
        torch.get_num_threads(),
        [mask.data_ptr() for mask in masks],
        all_ties_or_none,
    )
    ties, kept_in_all = (
        torch.tensor(number, dtype=torch.int64, device="cpu") for number in (ties_kept, counted)
    )
    return masks, scores[0].new_tensor(threshold), ties, kept_in_all


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
