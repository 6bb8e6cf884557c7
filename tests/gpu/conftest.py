"""These tests run Triton's kernels: on a GPU, or without one by its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch

from vpns_kernels.ops._triton.backend import is_interpreted

collect_ignore_glob = [] if torch.cuda.is_available() or is_interpreted() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if is_interpreted() else "cuda")
