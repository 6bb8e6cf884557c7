"""These tests run Triton's kernels: on a GPU, or without one by its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vpns_kernels.ops._triton import launch
from vpns_kernels.ops._triton.backend import is_interpreted

collect_ignore_glob = [] if torch.cuda.is_available() or is_interpreted() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if is_interpreted() else "cuda")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Products of float32 are taken in full: torch lets its convolutions round them to TF32 on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=[8, 9], ids=["by_address", "by_descriptor"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The compute capability that kernels take a device for: blocks are read by addresses, or descriptors
    (but for full products of float32).
    """
    found = int(request.param)
    monkeypatch.setattr(launch, "capability_of", lambda device: found)
    return found
