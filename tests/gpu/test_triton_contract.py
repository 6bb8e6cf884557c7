"""Every op × case of the contract suite by the triton backend, where the kernels can run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.kernels.test_contract import CHECKS, can_run, run
from vpns_kernels import OPS
from vpns_kernels.ops.case import Case
from vpns_kernels.testing import poisoned_memory

# What another test runs too, where there is time: the fused op has the same kernels, with all that can follow
# them, test_triton_channels the masked layers with their gradients, test_triton_kept_conv2d all of that op.
TWICE = (
    ("sparse_conv2d", "channel-"),
    ("sparse_conv2d", "block:16x16"),
    ("masked_conv2d", "channel-"),
    ("kept_conv2d", ""),
)
ROWS = [
    pytest.param(
        op,
        case,
        id=f"{op.name}-{case.name}",
        marks=[pytest.mark.long] if any(op.name == o and form in case.name for o, form in TWICE) else [],
    )
    for op in OPS.values()
    if "triton" in op.backends
    for case in op.cases()
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize(("op", "case"), ROWS)
def test_triton_meets_the_contract_or_says_why_it_cannot(op: Any, case: Case, device: torch.device) -> None:
    args = case.build()
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    if can_run(op, moved, "triton"):
        result = run(op.name, moved, "triton")
        # Sums are taken in one order, whatever the programs' order is; the interpreter knows one only.
        again = run(op.name, moved, "triton") if device.type == "cuda" else result
        for one, other in zip(tree_leaves(result), tree_leaves(again), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        CHECKS[op.name](args, tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result))
        for leaf, original in zip(tree_leaves(moved), tree_leaves(args), strict=True):
            if isinstance(leaf, torch.Tensor):
                torch.testing.assert_close(leaf.cpu(), original, rtol=0, atol=0, equal_nan=True)
    else:
        with pytest.raises(NotImplementedError, match=r"backend 'triton' cannot run this: .*'reference'"):
            run(op.name, moved, "triton")
