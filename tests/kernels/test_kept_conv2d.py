"""What is special about kept_conv2d: gradients, what is not read, torch's contracts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_contract import kept_conv2d_inputs
from vpns_kernels import OPS, ConvGeometry, kept_conv2d
from vpns_kernels.ops.case import Case
from vpns_kernels.ops.kept_conv2d import compact
from vpns_kernels.ops.kept_conv2d.cases import build_args
from vpns_kernels.testing import poisoned_memory

OP = OPS["kept_conv2d"]
# Triton's kernels have tests of their own, in tests/gpu.
BACKENDS = ("compact", "reference")
ROUNDOFF = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw_gradient(y: Tensor, args: dict[str, Any]) -> Tensor:
    """Of the result: zero where outputs are masked."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    if args["output_mask"] is not None:
        grad[:, ~args["output_mask"]] = 0
    return grad


@pytest.mark.parametrize("masks_outputs", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OP.cases(), ids=lambda case: case.name)
def test_gradients_are_those_of_all_channels_in_double_precision(
    case: Case, backend: str, masks_outputs: bool
) -> None:
    args = case.build()
    if not masks_outputs:
        args["output_mask"] = None
    if OP.module(backend).why_not(*kept_conv2d_inputs(args)) is not None:
        return
    x, weight, bias = args["x"], args["weight"].to(args["x"].dtype), args["bias"]
    leaves = [tensor.requires_grad_() for tensor in (x, bias) if tensor is not None]
    with poisoned_memory():
        y = kept_conv2d(**args, backend=backend)
        grad = draw_gradient(y, args)
        found, *rest = torch.autograd.grad(y, leaves, grad)
    g = args["geometry"]
    sizes = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups)
    truth, scale = (
        torch.ops.aten.convolution_backward(dy, x.double(), w, None, *sizes, [True, False, False])[0]
        for dy, w in ((grad.double(), weight.double()), (grad.double().abs(), weight.double().abs()))
    )
    assert found.dtype == x.dtype
    assert bool(((found - truth).abs() <= ROUNDOFF[x.dtype] * (scale + truth.abs()) + 1e-30).all())
    for grad_bias in rest:
        torch.testing.assert_close(grad_bias.double(), grad.double().sum((0, 2, 3)), rtol=1e-2, atol=1e-2)


def test_few_channels_are_gathered_at_either_end_and_the_others_not_read() -> None:
    args = build_args("primes", 0.3, "channels_last", torch.float32, True)
    args["x"].requires_grad_()
    expected = kept_conv2d(**args, backend="reference")
    grad = draw_gradient(expected, args)
    (expected_x,) = torch.autograd.grad(expected, args["x"], grad)
    args["x"] = args["x"].detach().clone()
    args["x"][:, ~args["input_mask"]] = grad[:, ~args["output_mask"]] = float("nan")
    y = kept_conv2d(**args | {"x": args["x"].requires_grad_()}, backend="compact")
    (grad_x,) = torch.autograd.grad(y, args["x"], grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-4, atol=1e-4)


def test_where_gathering_spares_nothing_all_channels_are_read() -> None:
    half = torch.tensor([True, False] * 4)
    few = compact._few(half)
    assert few is not None
    assert few.tolist() == [0, 2, 4, 6]
    half[1] = True
    assert compact._few(half) is None
    assert compact._few(torch.zeros(8, dtype=torch.bool)) is None


def test_another_device_is_not_asked_what_the_mask_holds() -> None:
    geometry = ConvGeometry(8, 4, (3, 3))
    x, weight = torch.empty(2, 8, 5, 5, device="meta"), torch.empty(geometry.weight_shape, device="meta")
    mask = torch.zeros(8, dtype=torch.bool, device="meta")
    assert kept_conv2d(x, weight, mask, geometry).shape == (2, 4, 3, 3)
    with pytest.raises(NotImplementedError, match=r"for which meta would have to be waited for.*'reference'"):
        kept_conv2d(x, weight, mask, geometry, backend="compact")


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_finds_the_op_in_order(backend: str) -> None:
    args = build_args("3x3_stride_2", 0.3, "channels_last", torch.float32, True)
    args["x"].requires_grad_(), args["bias"].requires_grad_()
    # Its random gradients are not zero where outputs are masked.
    args["output_mask"] = None
    torch.library.opcheck(torch.ops.vpns.kept_conv2d.default, (*kept_conv2d_inputs(args), backend))


def test_a_second_derivative_is_refused() -> None:
    args = build_args("3x3", 0.3, "channels_last", torch.float32, False)
    y = kept_conv2d(**args | {"x": args["x"].requires_grad_()})
    with pytest.raises(NotImplementedError, match="kept_conv2d: expected a first derivative"):
        torch.autograd.grad(y.sum(), args["x"], create_graph=True)


def test_bad_input_is_refused_with_what_was_expected() -> None:
    geometry = ConvGeometry(3, 2, (1, 1))
    good: dict[str, Any] = {
        "x": torch.ones(2, 3, 4, 4),
        "weight": torch.ones(geometry.weight_shape),
        "input_mask": torch.ones(3, dtype=torch.bool),
        "output_mask": torch.ones(2, dtype=torch.bool),
        "bias": torch.ones(2),
        "geometry": geometry,
    }
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": torch.ones(2, 4, 4, 4)}, ValueError, r"expected x \[N, 3, H, W\], got \[2, 4, 4, 4\]"),
        ({"weight": torch.ones(2, 3)}, ValueError, r"expected a weight \[2, 3, 1, 1\], got \[2, 3\]"),
        ({"weight": torch.ones(2, 3, 1, 1, requires_grad=True)}, ValueError, "expected a frozen weight"),
        (
            {"weight": torch.ones(2, 3, 1, 1).int()},
            TypeError,
            "expected weight of a floating dtype, got torch.int32",
        ),
        ({"bias": torch.ones(3)}, ValueError, r"expected bias \[2\], got \[3\]"),
        (
            {"input_mask": torch.ones(2, dtype=torch.bool)},
            ValueError,
            r"expected input_mask \[3\], got \[2\]",
        ),
        ({"output_mask": torch.ones(2)}, TypeError, "expected a bool output_mask, got torch.float32"),
        ({"backend": "fpga"}, ValueError, "expected backend in"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=f"kept_conv2d: .*{message}"):
            kept_conv2d(**good | change)
