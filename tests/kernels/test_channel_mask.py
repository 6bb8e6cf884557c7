"""What is special about channel_mask: gradients, torch's contracts, determinism, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vpns_kernels import OPS, channel_mask
from vpns_kernels.testing import poisoned_memory

OP = OPS["channel_mask"]
# Triton's kernels have tests of their own, in tests/gpu.
BACKENDS = ("cpu", "reference")
ROWS = [
    pytest.param(backend, case, id=f"{backend}-{case.name}") for backend in BACKENDS for case in OP.cases()
]


def gradients(args: dict[str, Any], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and of the scores, and the gradient of the output that they come from."""
    x, scores = args["x"].detach().requires_grad_(), args["scores"].requires_grad_()
    y = channel_mask(x, scores, args["mask"], backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grad_x, grad_scores = torch.autograd.grad(y, (x, scores), grad)
    return grad_x, grad_scores, grad


@pytest.mark.parametrize(("backend", "case"), ROWS)
def test_gradients_are_those_of_the_definition_in_double_precision(backend: str, case: Any) -> None:
    args = case.build()
    if OP.module(backend).why_not(args["x"], args["scores"], args["mask"]) is not None:
        return
    with poisoned_memory():
        grad_x, grad_scores, grad = gradients(args, backend)
    x, scores, mask = args["x"].double(), args["scores"].detach(), args["mask"]
    keep = mask.view(1, -1, *(1,) * (x.dim() - 2))
    assert torch.equal(grad_x, grad * keep)
    others = [axis for axis in range(x.dim()) if axis != 1]
    products = x * grad.double()
    limit = 1e-6 if scores.dtype == torch.float32 else 1e-14
    error = (grad_scores.double() - scores.double().sign() * products.sum(others)).abs()
    assert grad_scores.dtype == scores.dtype
    assert bool((error <= limit * products.abs().sum(others)).all())


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    scores, mask = torch.randn(5, dtype=torch.float64), torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x: channel_mask(x, scores, mask, "reference"), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_finds_the_op_in_order(backend: str) -> None:
    args = next(case for case in OP.cases() if case.name == "odd-float32-some-channels_last").build()
    inputs = (args["x"].requires_grad_(), args["scores"].requires_grad_(), args["mask"], backend)
    torch.library.opcheck(torch.ops.vpns.channel_mask.default, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_each_time_and_for_any_thread_count(dtype: torch.dtype) -> None:
    x = torch.randn(7, 37, 11, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    args = {"x": x, "scores": torch.randn(37), "mask": torch.rand(37) < 0.5}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = gradients(args, "cpu")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(34):
                assert all(torch.equal(a, b) for a, b in zip(first, gradients(args, "cpu"), strict=True))
    finally:
        torch.set_num_threads(before)


def test_only_what_is_wanted_is_computed() -> None:
    x, scores, mask = torch.randn(2, 5, 3, 3), torch.randn(5), torch.tensor([True, False, True, True, False])
    grad = torch.randn(2, 5, 3, 3)
    for backend in BACKENDS:
        for wants in ([True, False], [False, True]):
            found = torch.ops.vpns.channel_mask_backward(grad, x, scores, mask, wants, backend)
            assert [tensor.numel() > 0 for tensor in found] == wants


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = channel_mask(x, torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="channel_mask: expected a first derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_bad_input_is_refused_with_what_was_expected() -> None:
    x, scores, mask = torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(3, dtype=torch.bool)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((x[0, 0, 0], scores, mask), ValueError, r"expected x \[N, C, ...\], got \[4\]"),
        ((x, scores[1:], mask), ValueError, r"expected scores \[3\], got \[2\]"),
        ((x, scores, mask[1:]), ValueError, r"expected mask \[3\], got \[2\]"),
        ((x, scores, scores), TypeError, "expected a bool mask, got torch.float32"),
        ((x.int(), scores, mask), TypeError, "expected x of a floating dtype, got torch.int32"),
        ((x, scores, mask, "fpga"), ValueError, "expected backend in"),
    ]
    for args, kind, message in bad:
        with pytest.raises(kind, match=f"channel_mask: .*{message}"):
            channel_mask(*args)
