"""Gradients of block-sparse and block-masked convolutions by Triton, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vpns_kernels
from vpns_kernels import ConvGeometry, pack, parse_pattern, unpack
from vpns_kernels.ops._triton.backend import is_interpreted
from vpns_kernels.testing import poisoned_memory

DTYPES = (
    [torch.float32, torch.float16] if is_interpreted() else [torch.float32, torch.float16, torch.bfloat16]
)
LAYERS: dict[str, tuple[ConvGeometry, tuple[int, int, int]]] = {
    "3x3": (ConvGeometry(32, 48, (3, 3), padding=(1, 1)), (2, 5, 9)),
    "3x3_stride_2": (ConvGeometry(48, 32, (3, 3), (2, 2), (1, 1)), (3, 7, 6)),
    "1x1_stride_2": (ConvGeometry(16, 32, (1, 1), (2, 2)), (2, 5, 5)),
    "mixed_stride": (ConvGeometry(33, 17, (3, 5), (1, 2), (0, 3), (2, 1)), (2, 7, 6)),
    "two_strides_by_one_pixel": (ConvGeometry(16, 16, (3, 3), (2, 2), (1, 1)), (2, 1, 3)),
    "linear": (ConvGeometry(70, 40, (1, 1)), (33, 1, 1)),
    "batch_0": (ConvGeometry(16, 16, (3, 3), padding=(1, 1)), (0, 4, 4)),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(pattern: Any, geometry: ConvGeometry, density: float) -> Tensor:
    shape = pattern.units_shape(geometry.weight_shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density


def assert_within(found: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Sums in float32, rounded once to their type: `scale` is the sum of the terms' magnitudes."""
    error = (found.cpu().double() - truth).abs()
    bound = 4 * torch.finfo(torch.float32).eps * scale + torch.finfo(dtype).eps * truth.abs() + 1e-30
    assert bool((error <= bound).all()), float((error / bound).max())


def gradients(x: Tensor, weight: Tensor, grad: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """In float64, of x and of the dense weight."""
    g = geometry
    sizes = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups)
    found = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, *sizes, [True, True, False]
    )
    return found[0], found[1]


@pytest.fixture(autouse=True)
def _poison() -> Any:
    with poisoned_memory():
        yield


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_packed_layer_gets_its_gradients(
    layer: str, density: float, dtype: torch.dtype, device: torch.device
) -> None:
    geometry, (N, H, W) = LAYERS[layer]
    pattern = parse_pattern("block:16x16")
    mask = pattern.expand(units(pattern, geometry, density), geometry.weight_shape)
    packed = pack(draw(*geometry.weight_shape, seed=1), mask, pattern, geometry, dtype)
    x = draw(N, geometry.in_channels, H, W, seed=2).to(dtype)
    grad = draw(N, geometry.out_channels, *geometry.output_size(H, W), seed=4).to(dtype)
    leaves = [t.to(device).requires_grad_() for t in (x, packed.values)]
    layout = [t.to(device) for t in packed.layout]
    y = vpns_kernels.sparse_conv2d(leaves[0], leaves[1], layout, geometry, backend="triton")
    found = torch.autograd.grad(y, leaves, grad.to(device))
    weight = unpack(packed.values, packed.layout, geometry)
    expected_x, dense = gradients(x, weight, grad, geometry)
    scale_x, scale = gradients(x.abs(), weight.abs(), grad.abs(), geometry)
    assert found[0].dtype == found[1].dtype == dtype
    assert_within(found[0], expected_x, scale_x, dtype)
    blocks = [
        vpns_kernels.formats.pick(t, packed.values.double(), packed.layout, geometry) for t in (dense, scale)
    ]
    assert_within(found[1], blocks[0], blocks[1], dtype)
    again = vpns_kernels.sparse_conv2d(leaves[0], leaves[1], layout, geometry, backend="triton")
    for one, other in zip(found, torch.autograd.grad(again, leaves, grad.to(device)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_masked_layer_gets_gradients_of_its_input_and_of_all_scores(
    layer: str, density: float, dtype: torch.dtype, device: torch.device
) -> None:
    geometry, (N, H, W) = LAYERS[layer]
    pattern = parse_pattern("block:16x16")
    mask = units(pattern, geometry, density)
    weight, scores = draw(*geometry.weight_shape, seed=1), draw(*mask.shape, seed=5)
    x = draw(N, geometry.in_channels, H, W, seed=2).to(dtype)
    grad = draw(N, geometry.out_channels, *geometry.output_size(H, W), seed=4).to(dtype)
    leaves = [t.to(device).requires_grad_() for t in (x, scores)]
    y = vpns_kernels.masked_conv2d(
        leaves[0], weight.to(device), mask.to(device), leaves[1], geometry, pattern, backend="triton"
    )
    found = torch.autograd.grad(y, leaves, grad.to(device))
    masked = (weight * pattern.expand(mask, geometry.weight_shape)).to(dtype)
    expected_x, _ = gradients(x, masked, grad, geometry)
    scale_x, _ = gradients(x.abs(), masked.abs(), grad.abs(), geometry)
    assert_within(found[0], expected_x, scale_x, dtype)
    _, dense = gradients(x, weight, grad, geometry)
    _, scale = gradients(x.abs(), weight, grad.abs(), geometry)
    expected = scores.double().sign() * pattern.reduce_sum(weight.double() * dense)
    assert found[1].dtype == torch.float32
    assert_within(found[1], expected, pattern.reduce_sum(weight.double().abs() * scale), torch.float32)


@pytest.mark.parametrize("spec", ["block:32x16", "block:16x64", "block:64x64"])
def test_blocks_of_unequal_sides_and_beyond_the_weight_get_their_gradients(
    spec: str, device: torch.device
) -> None:
    geometry, pattern = ConvGeometry(72, 40, (3, 3), padding=(1, 1)), parse_pattern(spec)
    mask = units(pattern, geometry, 0.6)
    weight, scores = draw(*geometry.weight_shape, seed=1), draw(*mask.shape, seed=5)
    x, grad = draw(1, 72, 4, 5, seed=2), draw(1, 40, 4, 5, seed=4)
    args = (weight.to(device), mask.to(device))
    results = {}
    for backend in ("triton", "reference"):
        leaves = [t.to(device, torch.float64 if backend == "reference" else None) for t in (x, scores)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        wide = args[0].to(leaves[0].dtype)
        y = vpns_kernels.masked_conv2d(
            leaves[0], wide, args[1], leaves[1], geometry, pattern, backend=backend
        )
        results[backend] = (y, *torch.autograd.grad(y, leaves, grad.to(y)))
    for found, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-4)


def test_torch_finds_the_ops_in_order(device: torch.device) -> None:
    geometry, pattern = ConvGeometry(16, 32, (3, 3), padding=(1, 1)), parse_pattern("block:16x16")
    sizes = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups, ["triton"] * 3)
    mask = units(pattern, geometry, 0.5)
    weight = draw(*geometry.weight_shape, seed=1)
    packed = pack(weight, pattern.expand(mask, geometry.weight_shape), pattern, geometry)
    x, values, scores = (
        tensor.to(device).requires_grad_()
        for tensor in (draw(1, 16, 3, 3, seed=2), packed.values, draw(*mask.shape, seed=5))
    )
    layout = [tensor.to(device) for tensor in packed.layout]
    inputs = (x, values, layout, None, geometry.weight_shape, *sizes)
    torch.library.opcheck(torch.ops.vpns.sparse_conv2d.default, inputs)
    masked = (x, weight.to(device), mask.to(device), scores, None, pattern.spec, *sizes)
    torch.library.opcheck(torch.ops.vpns.masked_conv2d.default, masked)


def test_linear_is_the_convolution_of_one_pixel(device: torch.device) -> None:
    pattern, weight = parse_pattern("block:16x16"), draw(40, 70, seed=1)
    shape = pattern.units_shape((40, 70))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    x, scores = draw(2, 5, 70, seed=2), draw(*shape, seed=5)
    inputs = [tensor.to(device) for tensor in (x, weight, mask, scores)]
    y = vpns_kernels.masked_linear(*inputs, pattern, backend="triton")
    truth = x.double() @ (weight * pattern.expand(mask, (40, 70))).double().T
    assert y.shape == (2, 5, 40)
    torch.testing.assert_close(y.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_a_hostile_layout_is_refused_before_a_kernel_sees_it(device: torch.device) -> None:
    geometry, pattern = ConvGeometry(32, 32, (1, 1)), parse_pattern("block:16x16")
    weight = draw(32, 32, 1, 1, seed=1)
    packed = pack(weight, torch.ones_like(weight, dtype=torch.bool), pattern, geometry)
    layout = [t.clone().to(device) for t in packed.layout]
    layout[1][-1] = 1_000_000
    x, values = draw(1, 32, 2, 2, seed=2).to(device), packed.values.to(device)
    with pytest.raises(ValueError, match="expected index in"):
        vpns_kernels.sparse_conv2d(x, values, layout, geometry, backend="triton")


@pytest.mark.parametrize(
    ("geometry", "spec", "reason"),
    [
        (ConvGeometry(32, 32, (3, 3), groups=2), "block:16x16", "groups=1, got 2"),
        (ConvGeometry(32, 32, (3, 3), (3, 3)), "block:16x16", r"strides of 1 and 2, got \(3, 3\)"),
        (ConvGeometry(32, 32, (3, 3)), "block:8x4", "sides of 16, 32, 64, got 8x4"),
        (ConvGeometry(32, 32, (3, 3), dilation=(200, 1)), "block:16x16", "taps within 127 steps"),
        (ConvGeometry(32, 32, (3, 3)), "unstructured", "it takes masks of blocks"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_with_the_reason(
    geometry: ConvGeometry, spec: str, reason: str, device: torch.device
) -> None:
    pattern = parse_pattern(spec)
    shape = pattern.units_shape(geometry.weight_shape)
    x = torch.zeros(1, 32, 500, 8, device=device)
    mask, scores = torch.ones(shape, dtype=torch.bool, device=device), torch.ones(shape, device=device)
    weight = torch.zeros(geometry.weight_shape, device=device)
    with pytest.raises(NotImplementedError, match=f"{reason}.*'reference'"):
        vpns_kernels.masked_conv2d(x, weight, mask, scores, geometry, pattern, backend="triton")
