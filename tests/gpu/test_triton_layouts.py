"""Do kernels follow a layout that was changed in place, and take values wherever they lie?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vpns_kernels import parse_pattern
from vpns_kernels.formats import Packed, pack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops import masked_conv2d, sparse_conv2d
from vpns_kernels.ops._triton import launch

GEOMETRY = ConvGeometry(48, 48, (1, 1))


def make_packed(spec: str, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Packed:
    """Half of the units of a random weight, as many for every seed."""
    generator, pattern = torch.Generator().manual_seed(seed), parse_pattern(spec)
    weight = torch.randn(GEOMETRY.weight_shape, generator=generator).to(dtype)
    if spec == "channel":
        outputs, inputs = (torch.randperm(48, generator=generator) < 24 for _ in range(2))
        mask = (outputs[:, None] & inputs)[..., None, None].contiguous()
    else:
        units = pattern.units_shape(GEOMETRY.weight_shape)
        kept = torch.randperm(math.prod(units), generator=generator).view(units) < math.prod(units) // 2
        mask = pattern.expand(kept, GEOMETRY.weight_shape)
    packed = pack(weight, mask, pattern, GEOMETRY)
    return Packed(packed.values.to(device), tuple(a.to(device) for a in packed.layout), pattern, GEOMETRY)


def all_passes(packed: Packed, x: Tensor, backend: str) -> list[Tensor]:
    values = packed.values.detach().requires_grad_()
    x = x.detach().requires_grad_()
    y = sparse_conv2d(x, values, packed.layout, GEOMETRY, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.sum(), (x, values))]


@pytest.mark.parametrize("spec", ["block:16x16", "channel"])
def test_a_layout_that_was_written_is_followed(spec: str, device: torch.device) -> None:
    x = torch.randn(2, 48, 5, 4, generator=torch.Generator().manual_seed(3)).to(device)
    first, second = (make_packed(spec, seed, device) for seed in (0, 1))
    before = all_passes(first, x, "triton")
    for old, new in zip((first.values, *first.layout), (second.values, *second.layout), strict=True):
        assert old.shape == new.shape
        old.copy_(new)
    found, expected = (all_passes(packed, x, "triton") for packed in (first, second))
    assert not torch.equal(before[0], expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def misaligned(tensor: Tensor) -> Tensor:
    """The same, one entry behind a multiple of 16 bytes."""
    found = tensor.new_empty(tensor.numel() + 8)[1 : tensor.numel() + 1].view(tensor.shape).copy_(tensor)
    assert found.data_ptr() % 16
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", ["block:16x16", "channel"])
@pytest.mark.usefixtures("capability")
def test_values_may_begin_anywhere(spec: str, dtype: torch.dtype, device: torch.device) -> None:
    packed = make_packed(spec, 0, device, dtype)
    moved = Packed(misaligned(packed.values), packed.layout, packed.pattern, packed.geometry)
    x = torch.randn(2, 48, 5, 4, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(all_passes(moved, x, "triton"), all_passes(packed, x, "triton"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spec", ["block:16x16", "channel"])
@pytest.mark.usefixtures("capability")
def test_a_masked_weight_may_begin_anywhere(spec: str, device: torch.device) -> None:
    generator, pattern = torch.Generator().manual_seed(0), parse_pattern(spec)
    weight = torch.randn(GEOMETRY.weight_shape, generator=generator).to(device)
    scores = torch.randn(pattern.units_shape(weight.shape), generator=generator).to(device)
    x = torch.randn(2, 48, 5, 4, generator=generator).to(device)
    ours, theirs = (
        masked_conv2d(x, given, scores > 0, scores, GEOMETRY, pattern, backend="triton")
        for given in (misaligned(weight), weight)
    )
    assert torch.equal(ours, theirs)


@pytest.fixture
def precision() -> Iterator[None]:
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    yield
    convolution.fp32_precision = before


@pytest.mark.usefixtures("precision")
def test_float32_is_rounded_as_convolutions_were_told_whichever_way(device: torch.device) -> None:
    for told, expected in (("ieee", "ieee"), ("tf32", "tf32")):
        torch.backends.cudnn.conv.fp32_precision = told
        assert launch.dot_precision(torch.float32) == expected
        assert launch.dot_precision(torch.bfloat16) == "ieee"
