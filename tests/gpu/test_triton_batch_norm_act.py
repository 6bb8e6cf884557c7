"""Triton's batch_norm_act: gradients against float64, statistics of hard numbers, splits, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vpns_kernels import OPS, batch_norm_act
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops._triton import columns
from vpns_kernels.ops.batch_norm_act import triton
from vpns_kernels.testing import poisoned_memory

HERE = (torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available())
CASES = [
    case
    for case in OPS["batch_norm_act"].cases()
    if any(f"-{dtype_name(dtype)}-" in case.name for dtype in HERE)
    # Large ones take the interpreter seconds.
    and (torch.cuda.is_available() or not case.name.startswith(("wide", "layer-float32")))
]


def on(device: torch.device, args: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in args.items()}


def result_and_gradients(args: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, a random gradient of it, and those of all tensors that it comes from."""
    names = [name for name in ("x", "weight", "bias", "residual") if args[name] is not None]
    leaves = {name: args[name].detach().clone().requires_grad_() for name in names}
    y, _, _ = batch_norm_act(**(args | leaves), backend="triton")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return y.detach(), grad, list(torch.autograd.grad(y, list(leaves.values()), grad))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_torch_in_double_precision(case: Any, device: torch.device) -> None:
    args = on(device, case.build())
    with poisoned_memory():
        y, grad, found = result_and_gradients(args)
        again = result_and_gradients(args)
    assert all(torch.equal(one, other) for one, other in zip(found, again[2], strict=True))
    names = [name for name in ("x", "weight", "bias", "residual") if args[name] is not None]
    wide = {name: args[name].double().requires_grad_() for name in names}
    normal = torch.nn.functional.batch_norm(
        wide["x"], None, None, wide["weight"], wide["bias"], training=True
    )
    normal = normal + wide.get("residual", 0)
    passed = grad.double()
    # The activation passes where the rounded output says so.
    if args["act"] != "none":
        passed = passed * (y > 0)
    if args["act"] == "relu6":
        passed = passed * (y < 6)
    truth = torch.autograd.grad(normal, list(wide.values()), passed)
    roundoff = max(torch.finfo(y.dtype).eps, 1e-6)
    for name, ours, theirs in zip(names, found, truth, strict=True):
        # Where a channel is constant its precision is 1 / eps, and the mean's rounding counts that often.
        far = 1e4 if "constant" in case.name or "far" in case.name or "two_values" in case.name else 10
        limit = far * roundoff * float(theirs.abs().max() + passed.abs().max())
        assert ours.dtype == args[name].dtype
        assert float((ours.double() - theirs).abs().max()) <= limit, name


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_statistics_hold_for_numbers_far_from_zero_in_any_number_of_splits(
    splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 20, 9, 12, generator=generator) + 100
    # A first number that is no sample of the others, and a channel without any spread.
    x[0, 3, 0, 0], x[:, 4] = -100, 7.0
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    tiles = columns.ColumnTiles(16, 32, splits, -(-324 // (16 * splits)) * 16, warps=4)
    monkeypatch.setattr(triton, "pick_tiles", lambda rows, channels: tiles)
    ones = torch.ones(20, device=device)
    with poisoned_memory():
        _, mean, variance = batch_norm_act(x, ones, ones, backend="triton")
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    assert float(variance[4]) == 0


def test_nan_stays_in_its_channel(device: torch.device) -> None:
    x = torch.randn(2, 7, 3, 3, device=device)
    x[1, 5, 2, 2] = float("nan")
    ones = torch.ones(7, device=device)
    y, mean, variance = batch_norm_act(x, ones, ones, act="relu", backend="triton")
    assert bool(y[:, 5].isnan().all())
    assert bool(mean[5].isnan() & variance[5].isnan())
    assert not bool(y[:, :5].isnan().any() | y[:, 6:].isnan().any())


def test_a_gradient_in_another_layout_and_type_is_taken(device: torch.device) -> None:
    x, grad = (torch.randn(2, 5, 4, 3, device=device) for _ in range(2))
    ones = torch.ones(5, device=device)
    y, mean, variance = triton.run(x, ones, ones, 1e-5, None, "relu")
    rest = (x, ones, ones, y, mean, variance, 1e-5, "relu", True)
    found = triton.run_backward(grad, *rest)
    for same in (grad.double(), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(found, triton.run_backward(same, *rest), strict=True))
    assert torch.equal(found[3], grad * (y > 0))
