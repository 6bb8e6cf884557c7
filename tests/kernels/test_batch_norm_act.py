"""What is special about batch_norm_act: gradients, torch's contracts, determinism, NaN, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vpns_kernels import OPS, batch_norm_act
from vpns_kernels.testing import poisoned_memory

CASES = OPS["batch_norm_act"].cases()


def learned(args: dict[str, Any]) -> list[Tensor]:
    tensors = [args["x"], args["weight"], args["bias"], args["residual"]]
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def gradients(args: dict[str, Any], backend: str) -> list[Tensor]:
    y, _, _ = batch_norm_act(**args, backend=backend)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype)
    return list(torch.autograd.grad(y, learned(args), grad))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_torch_in_double_precision(case: Any) -> None:
    args, wide = case.build(), case.build()
    if args["x"].dtype == torch.float64:
        pytest.skip("the native kernel takes float32 and halves")
    with poisoned_memory():
        learned(args)
        found = gradients(args, "cpu")
    wide = {
        key: value.detach().double() if isinstance(value, Tensor) else value for key, value in wide.items()
    }
    learned(wide)
    # The activation passes where the rounded output says so: compare on the same side of zero.
    y = batch_norm_act(**args, backend="cpu")[0].detach()
    normal = torch.nn.functional.batch_norm(
        wide["x"], None, None, wide["weight"], wide["bias"], training=True
    )
    normal = normal if wide["residual"] is None else normal + wide["residual"]
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype).double()
    if args["act"] != "none":
        grad = grad * (y > 0)
    if args["act"] == "relu6":
        grad = grad * (y < 6)
    truth = torch.autograd.grad(normal, learned(wide), grad)
    roundoff = max(torch.finfo(y.dtype).eps, 1e-6)
    for name, ours, theirs in zip(("x", "weight", "bias", "residual"), found, truth, strict=False):
        # Where a channel is constant its precision is 1 / eps, and the mean's rounding counts that often.
        far = 1e4 if "constant" in case.name or "far" in case.name or "two_values" in case.name else 10
        limit = far * roundoff * float(theirs.abs().max() + grad.abs().max())
        assert float((ours.double() - theirs).abs().max()) <= limit, name


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_goes_past_the_caches_is_what_stays_in_them(
    dtype: torch.dtype, roundoff: float, with_residual: bool
) -> None:
    # An image many times over has its own statistics, and its own results: 16 MiB of them.
    count = 16 * 1024 * 1024 // (64 * 64 * 64 * dtype.itemsize)
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(1, 64, 64, 64, generator=generator).to(dtype) for _ in range(3)]
    weight, bias = (torch.rand(64, generator=generator) + 0.5 for _ in range(2))

    def compute(copies: int) -> list[Tensor]:
        x, residual, grad = (
            draw.repeat(copies, 1, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
            for draw in draws
        )
        inputs = (x, residual) if with_residual else (x,)
        with poisoned_memory():
            y, _, _ = batch_norm_act(
                x, weight, bias, 1e-5, inputs[1] if with_residual else None, "relu", "cpu"
            )
            return [y.detach(), *torch.autograd.grad(y, inputs, grad.detach())]

    for small, large in zip(compute(1), compute(count), strict=True):
        assert large.numel() * large.itemsize >= 16 * 1024 * 1024
        off = (large.float() - small.float()).abs()
        # Where the activation's input rounds to either side of zero, a gradient may pass in one alone.
        is_near = off <= roundoff * small.float().abs().max()  # a NaN, which nobody wrote over, is not
        assert float((~is_near).float().mean()) < 1e-4


def test_gradcheck_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.rand(4, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, residual))
    for act in ("none", "relu", "relu6"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r, act=act: batch_norm_act(x, w, b, 1e-5, r, act, "reference")[0], inputs
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_finds_the_op_in_order(backend: str) -> None:
    args = next(case for case in CASES if case.name == "odd-float32-relu-residual-plain").build()
    learned(args)
    inputs = (args["x"], args["weight"], args["bias"], 1e-5, args["residual"], "relu", backend)
    torch.library.opcheck(torch.ops.vpns.batch_norm_act.default, inputs)


def test_it_compiles_as_a_whole_graph() -> None:
    args = next(case for case in CASES if case.name == "layer-float32-relu-plain").build()
    compiled = torch.compile(
        lambda x: batch_norm_act(x, args["weight"], args["bias"], act="relu")[0],
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(args["x"]), batch_norm_act(**args)[0], rtol=0, atol=0)


def test_the_same_bits_each_time_and_for_any_thread_count() -> None:
    args = next(case for case in CASES if case.name == "layer-float32-relu-residual-plain").build()
    learned(args)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = [*batch_norm_act(**args), *gradients(args, "cpu")]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(30):
                again = [*batch_norm_act(**args), *gradients(args, "cpu")]
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_nan_stays_in_its_channel() -> None:
    args = next(case for case in CASES if case.name == "layer-float32-relu-plain").build()
    args["x"][1, 5, 2, 3] = float("nan")
    y, mean, variance = batch_norm_act(**args)
    assert bool(y[:, 5].isnan().all())
    assert bool(mean[5].isnan() & variance[5].isnan())
    assert not bool(y[:, :5].isnan().any() | y[:, 6:].isnan().any())


def test_a_second_derivative_is_refused() -> None:
    args = next(case for case in CASES if case.name == "odd-float32-relu-plain").build()
    learned(args)
    y = batch_norm_act(**args)[0]
    with pytest.raises(NotImplementedError, match="expected a first derivative"):
        torch.autograd.grad(y.sum(), args["x"], create_graph=True)


X = torch.zeros(2, 4, 3, 3)
ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"expected x \[N, C, H, W\], got \[4, 3, 3\]"),
        ({"weight": torch.ones(3)}, r"expected weight \[4\], got \[3\]"),
        ({"bias": torch.ones(5)}, r"expected bias \[4\], got \[5\]"),
        ({"residual": X[:1]}, r"expected residual \[2, 4, 3, 3\]"),
        ({"residual": X.bfloat16()}, "expected residual .*float32, got .*bfloat16"),
        ({"act": "gelu"}, "expected act in .*'relu6'.*got 'gelu'"),
        ({"x": X[:1, :, :1, :1]}, "expected at least two values per channel"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_norm_act(**({"x": X, "weight": ONES, "bias": ONES} | change))
