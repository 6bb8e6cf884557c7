"""Are convolutions right where blocks are read by addresses, as before Hopper, and where by descriptors?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.kernels.test_contract import CHECKS, can_run, run
from vpns_kernels import OPS
from vpns_kernels.ops._triton import boxes
from vpns_kernels.ops.case import Case
from vpns_kernels.testing import poisoned_memory

# Blocks alone are read so; of the layers those that ask most of addresses, all others where there is time.
HARDEST = ("3x3_stride_2", "mixed_stride_and_padding", "few_pixels", "primes")
ROWS = [
    pytest.param(
        OPS[name],
        case,
        id=f"{name}-{case.name}",
        marks=[] if "block:32x32" in case.name and case.name.startswith(HARDEST) else [pytest.mark.long],
    )
    for name in ("sparse_conv2d", "sparse_conv2d_fused", "masked_conv2d")
    for case in OPS[name].cases()
    if "block:16x16" in case.name or "block:32x32" in case.name
]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_a_convolution_reads_by_either(op: Any, case: Case, device: torch.device) -> None:
    args = case.build()
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    if not can_run(op, moved, "triton"):
        with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this"):
            run(op.name, moved, "triton")
        return
    with poisoned_memory():
        result = run(op.name, moved, "triton")
    CHECKS[op.name](args, tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result))


def test_addresses_are_in_units_of_sixteen_bytes() -> None:
    rows = torch.zeros(2, 5, 6, 24, dtype=torch.bfloat16)[:, ::2]
    tensor, *numbers = boxes.as_boxes(rows, (1, 4, 4, 16), 8)
    assert tensor is rows
    assert numbers == [2, 3, 6, 3, 5 * 6 * 3, 2 * 6 * 3, 3]
    assert boxes.as_boxes(rows, (1, 4, 4, 16), 9).block_shape == [1, 4, 4, 16]
