"""Do kernels give the same bits every time? A thousand times on a GPU, where programs race."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.all_passes import TRITON_OPS, make_passes


@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_all_passes_give_the_same_bits_every_time(op: Any, device: torch.device) -> None:
    repeats = 1000 if device.type == "cuda" else 1
    cases = make_passes(op, device, 1)
    assert cases
    for all_passes in cases:
        expected = all_passes()
        differs = torch.zeros((), dtype=torch.bool, device=device)
        for _ in range(repeats):
            for one, other in zip(expected, all_passes(), strict=True):
                # Looked at once, at the end: a look each time would let one launch end before the next.
                differs |= (one != other).any()
        assert not bool(differs)
