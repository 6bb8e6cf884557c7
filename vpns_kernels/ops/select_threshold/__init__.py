"""select_threshold: the exact k-th largest magnitude over a list of tensors, without a sort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.ops._triton.backend import TritonBackend
from vpns_kernels.ops.registry import call, register_op
from vpns_kernels.ops.select_threshold import cpu, cuda, reference

__all__ = ["count_kept", "select_threshold"]

_OP = register_op(
    "select_threshold",
    # The first that can: on a GPU Triton's, which reads all scores once; the library's does so three times.
    {"cpu": cpu, "triton": TritonBackend("select_threshold"), "cuda": cuda, "reference": reference},
)


def count_kept(density: float, total: int) -> int:
    """How many of `total` entries a density keeps: rounded half up, at least one."""
    return max(1, math.floor(density * total + 0.5))


def select_threshold(
    scores: Sequence[Tensor],
    density: float | None = None,
    *,
    kept: int | None = None,
    backend: str = "auto",
    refuses_nan: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """The magnitude at which a global mask of the given density cuts.

    Args:
        scores: tensors of any shapes, one dtype and device.
        density: kept fraction in (0, 1]; round-half-up(density · n) entries are kept. Or give `kept` itself.
        refuses_nan: look for NaN at once, which waits for a GPU.

    Returns:
        threshold: 0-dim tensor, the smallest kept magnitude; NaN where a score is and that is not refused.
        ties_kept: 0-dim int64 tensor, how many entries equal to the threshold are kept.
        kept: how many entries are kept in all.

    Raises:
        ValueError: no scores, a count outside [1, n], or a NaN among the scores.

    Example:
        >>> threshold, ties_kept, kept = select_threshold([torch.tensor([3.0, -1.0, 1.0, 0.5])], 0.5)
        >>> float(threshold), int(ties_kept), kept
        (1.0, 1, 2)
    """
    tensors = [tensor.detach() for tensor in scores]
    total = sum(tensor.numel() for tensor in tensors)
    if total == 0:
        raise ValueError("select_threshold: expected at least one score, got none")
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        raise TypeError("select_threshold: expected scores of one dtype and device")
    if (density is None) == (kept is None):
        raise ValueError("select_threshold: expected either density or kept")
    if density is not None:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"select_threshold: expected a density in (0, 1], got {density}")
        kept = count_kept(density, total)
    assert kept is not None
    if not 1 <= kept <= total:
        raise ValueError(f"select_threshold: expected 1 <= kept <= {total}, got {kept}")
    resolved = _OP.resolve(backend, tensors, kept)
    threshold, ties_kept = call("select_threshold")(tensors, kept, resolved)
    if refuses_nan and not torch.compiler.is_compiling() and bool(threshold.isnan()):
        raise ValueError("select_threshold: expected scores without NaN, got NaN")
    return threshold, ties_kept, kept
