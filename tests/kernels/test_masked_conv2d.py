"""What is special about masked_conv2d: gradients, torch's contracts, determinism, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vpns_kernels import OPS, ConvGeometry, masked_conv2d, masked_linear, parse_pattern
from vpns_kernels.modules import MaskedConv2d, MaskedLinear
from vpns_kernels.ops.masked_conv2d.cases import PATTERNS, build_args
from vpns_kernels.testing import poisoned_memory

OP = OPS["masked_conv2d"]
BACKENDS = list(OP.backends)


def learned(args: dict[str, Any]) -> list[Tensor]:
    tensors = [args["x"], args["scores"], args["bias"]]
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def gradients(args: dict[str, Any], backend: Any) -> list[Tensor]:
    leaves, y = learned(args), masked_conv2d(**args, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, grad))


@pytest.mark.parametrize("spec", [*PATTERNS, "channel"])
def test_gradcheck_of_the_reference(spec: str) -> None:
    # The score gradient is by design not a derivative: it has a test of its own.
    generator = torch.Generator().manual_seed(0)
    geometry, pattern = ConvGeometry(6, 4, (3, 2), (2, 1), (1, 0)), parse_pattern(spec)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 6, 5, 4), geometry.weight_shape, (4,))
    )
    scores = torch.randn(pattern.units_shape(geometry.weight_shape), generator=generator).double()
    mask = torch.rand(scores.shape, generator=generator) < 0.6

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return masked_conv2d(x, weight, mask, scores, geometry, pattern, bias, "reference")

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [*PATTERNS, "channel"])
def test_the_reference_has_the_bits_of_the_masked_layer_that_torch_differentiates(
    spec: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    layer = MaskedConv2d.from_dense(nn.Conv2d(40, 24, 3, 2, 1, dtype=dtype), parse_pattern(spec))
    layer.backend = "reference"
    with torch.no_grad():
        layer.scores.normal_()
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.3)
    x = torch.randn(3, 40, 9, 11, dtype=dtype)
    found = []
    for trains in (False, True):
        layer.weight.requires_grad_(trains)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append([y, *torch.autograd.grad(y, (leaf, layer.scores), direction)])
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", PATTERNS)
def test_torch_finds_the_op_in_order(spec: str, backend: str) -> None:
    args = build_args("3x3_stride_2", spec, 0.3, "channels_last", torch.float32, True)
    learned(args)
    g, bias = args["geometry"], args["bias"]
    tensors = (args["x"], args["weight"], args["mask"], args["scores"], bias)
    inputs = (*tensors, spec, g.stride, g.padding, g.dilation, g.groups, [backend] * 3)
    torch.library.opcheck(torch.ops.vpns.masked_conv2d.default, inputs)


def test_a_second_derivative_is_refused() -> None:
    args = build_args("3x3", "unstructured", 0.3, "channels_last", torch.float32, False)
    x = args["x"].requires_grad_()
    y = masked_conv2d(**args)
    with pytest.raises(NotImplementedError, match="masked_conv2d: expected a first derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_is_the_convolution_of_one_pixel(backend: str) -> None:
    torch.manual_seed(4)
    for spec in PATTERNS:
        layer = MaskedLinear.from_dense(nn.Linear(50, 70), parse_pattern(spec))
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            layer.scores.normal_()
            layer.mask.copy_(torch.rand(layer.mask.shape) < 0.4)
        x = torch.randn(2, 3, 50, requires_grad=True)
        weight, mask, scores = layer.weight, layer.mask, layer.scores
        y = masked_linear(x, weight, mask, scores, layer.pattern, layer.bias, backend)
        masked = (weight * layer.weight_mask()).requires_grad_()
        truth = torch.nn.functional.linear(x, masked, layer.bias)
        torch.testing.assert_close(y, truth)
        direction = torch.randn_like(truth)
        grad_x, grad_scores = torch.autograd.grad(y, (x, scores), direction)
        true_x, dense = torch.autograd.grad(truth, (x, masked), direction)
        torch.testing.assert_close(grad_x, true_x)
        expected = scores.sign() * layer.pattern.reduce_sum(weight * dense)
        torch.testing.assert_close(grad_scores, expected, rtol=1e-4, atol=1e-4)


CASES = [case for case in OP.cases() if "float64" not in case.name]
ROUNDOFF = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def true_gradients(args: dict[str, Any], weight: Tensor, is_size: bool) -> list[Tensor]:
    """In float64, with all scores positive; or the sizes of their sums: of the terms' magnitudes."""
    size_of = torch.abs if is_size else torch.clone
    x, weight = size_of(args["x"].detach().double()), size_of(weight.double())
    scores = torch.ones_like(args["scores"], dtype=torch.float64)
    wide = args | {"x": x.requires_grad_(), "weight": weight, "scores": scores.requires_grad_(), "bias": None}
    y = masked_conv2d(**wide, backend="reference")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(args["x"].dtype).double()
    return list(torch.autograd.grad(y, (x, scores), size_of(grad)))


def assert_gradients_are_right(args: dict[str, Any], found: list[Tensor]) -> None:
    """Against float64, by the size of the sums: |error| / Σ|terms| of a few units of roundoff."""
    (grad_x, grad_scores, *_), dtype = found, args["x"].dtype
    # The products of the input's gradient take the weight as it is rounded, those of the scores as it is.
    rounded = args["weight"].to(dtype)
    (true_x, _), (size_x, _) = (true_gradients(args, rounded, is_size) for is_size in (False, True))
    (_, truth), (_, size) = (true_gradients(args, args["weight"], is_size) for is_size in (False, True))
    error_x = (grad_x.double() - true_x).abs()
    assert bool((error_x <= ROUNDOFF[dtype] * (size_x + true_x.abs()) + 1e-30).all())
    # Blocks are summed in float32 whatever the inputs are; single weights are torch's own gradients, rounded.
    limit = 1e-6 if args["pattern"].name == "block" else ROUNDOFF[dtype]
    error = (grad_scores.double() - args["scores"].detach().double().sign() * truth).abs()
    assert grad_scores.dtype == args["scores"].dtype
    assert bool((error <= limit * (size + truth.abs()) + 1e-30).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_gradients_are_those_of_float64(case: Any) -> None:
    args = case.build()
    with poisoned_memory():
        found = gradients(args, "cpu")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_gradients_are_right(args, found)


def test_bad_input_is_refused_with_what_was_expected() -> None:
    good = build_args("3x3", "block:16x16", 0.3, "channels_last", torch.float32, True)
    weight, mask = good["weight"], good["mask"]
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": good["x"][:, 1:]}, ValueError, r"expected x \[N, 32, H, W\], got \[2, 31, 14, 14\]"),
        ({"weight": weight[1:]}, ValueError, r"expected a weight \[32, 32, 3, 3\], got \[31,"),
        ({"weight": nn.Parameter(weight)}, ValueError, "expected a frozen weight"),
        ({"weight": weight.int()}, TypeError, "expected weight of a floating dtype, got torch.int32"),
        ({"mask": mask[1:]}, ValueError, r"expected mask \[2, 2, 3, 3\] of pattern 'block:16x16', got \[1,"),
        ({"mask": mask.float()}, TypeError, "expected a bool mask, got torch.float32"),
        ({"scores": good["scores"][1:]}, ValueError, r"expected scores \[2, 2, 3, 3\]"),
        ({"scores": good["scores"].int()}, TypeError, "expected scores of a floating dtype"),
        ({"bias": good["bias"][1:]}, ValueError, r"expected bias \[32\], got \[31\]"),
        ({"backend": ("cpu", "reference")}, ValueError, "expected one backend, or three"),
        ({"backend": "fpga"}, ValueError, "expected backend in"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=f"masked_conv2d: .*{message}"):
            masked_conv2d(**(good | change))
    with pytest.raises(ValueError, match=r"masked_linear: expected x \[..., 5\], got \[3, 4\]"):
        masked_linear(torch.ones(3, 4), torch.ones(2, 5), mask, mask, parse_pattern("unstructured"))


def test_under_autocast_layers_compute_in_its_dtype() -> None:
    torch.manual_seed(6)
    layers: list[tuple[Any, tuple[int, ...]]] = [
        (MaskedConv2d.from_dense(nn.Conv2d(8, 6, 3, padding=1), parse_pattern("block:4x2")), (2, 8, 5, 4)),
        (MaskedLinear.from_dense(nn.Linear(8, 6), parse_pattern("block:4x2")), (5, 8)),
    ]
    for layer, shape in layers:
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            layer.scores.normal_()
        x = torch.randn(shape, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert layer.scores.grad.dtype == x.grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
