"""CUDA backend: csrc/cuda/select_threshold.cu, three counting passes; nothing waits for the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels import native


def why_not(scores: Sequence[Tensor], kept: int) -> str | None:
    """float32 on the GPU, and the library's GPU part."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cuda" for tensor in scores):
        return f"it takes float32 CUDA scores, got {scores[0].dtype} on {scores[0].device}"
    return native.why_no_cuda()


def run(scores: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    library = native.cuda_library()
    dense = [tensor.contiguous() for tensor in scores]
    threshold = scores[0].new_empty(())
    ties_kept = torch.empty((), dtype=torch.int64, device=scores[0].device)
    workspace = torch.empty(library.select_threshold_workspace(), dtype=torch.uint8, device=scores[0].device)
    with torch.cuda.device(scores[0].device):
        library.select_threshold(
            [tensor.data_ptr() for tensor in dense],
            [tensor.numel() for tensor in dense],
            kept,
            workspace.data_ptr(),
            threshold.data_ptr(),
            ties_kept.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return threshold, ties_kept
