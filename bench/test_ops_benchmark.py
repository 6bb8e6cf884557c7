"""Every op on its own cases, through pytest-benchmark: `pytest bench/ --benchmark-only`.

For a look at one op at a time; figures that are compared come from bench_ops.py, which interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vpns_kernels
from vpns_kernels import OPS
from vpns_kernels.ops.case import Case

ROWS = [
    pytest.param(op.name, case, backend, id=f"{op.name}-{case.name}-{backend}")
    for op in OPS.values()
    for case in op.cases()
    for backend in ("auto", "reference")
]


@pytest.mark.parametrize(("op", "case", "backend"), ROWS)
def test_op(benchmark: Any, op: str, case: Case, backend: str) -> None:
    arguments = case.build()
    with torch.no_grad():
        benchmark(getattr(vpns_kernels, op), **arguments, backend=backend)
