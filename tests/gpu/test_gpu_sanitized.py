"""A small set for compute-sanitizer: every kernel once; whether results are right is tested elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.all_passes import TRITON_OPS, make_passes
from vpns_kernels.ops._triton.backend import is_interpreted

pytestmark = pytest.mark.skipif(is_interpreted(), reason="needs a GPU, whose memory the sanitizer watches")


@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_kernels_stay_within_their_tensors(op: Any, device: torch.device) -> None:
    cases = make_passes(op, device, 2)
    assert cases
    for all_passes in cases:
        results = all_passes()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert all(result.isfinite().all() for result in results if result.is_floating_point())
