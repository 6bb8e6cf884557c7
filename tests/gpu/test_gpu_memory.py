"""What is left after a GPU ran out of memory in the middle of our kernels? A process that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.gpu.all_passes import TRITON_OPS, make_passes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_memory() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def take_all_memory(device: torch.device) -> list[torch.Tensor]:
    """What the allocator still has at hand, in its smallest pieces."""
    taken = []
    try:
        while True:
            taken.append(torch.empty(512, dtype=torch.uint8, device=device))
    except torch.cuda.OutOfMemoryError:
        return taken


@needs_gpu
@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_kernels_recover_from_a_gpu_without_memory(op: Any, device: torch.device, request: Any) -> None:
    all_passes = make_passes(op, device, 1)[0]
    expected = all_passes()
    request.getfixturevalue("no_memory")
    taken = take_all_memory(device)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        all_passes()
    del taken
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    for one, other in zip(expected, all_passes(), strict=True):
        assert torch.equal(one, other)
