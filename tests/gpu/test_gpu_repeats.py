"""Do kernels give the same bits every time? A thousand times on a GPU, where programs race."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.all_passes import TRITON_OPS, make_passes
from vpns_kernels.ops._triton.backend import is_interpreted

pytestmark = pytest.mark.skipif(is_interpreted(), reason="needs a GPU, on which programs race")


@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_all_passes_give_the_same_bits_every_time(op: Any, device: torch.device) -> None:
    cases = make_passes(op, device, 1)
    assert cases
    for all_passes in cases:
        expected = all_passes()
        differs = torch.zeros((), dtype=torch.bool, device=device)
        for _ in range(1000):
            for one, other in zip(expected, all_passes(), strict=True):
                # Looked at once, at the end: a look each time would let one launch end before the next.
                differs |= (one != other).any()
        assert not bool(differs)
