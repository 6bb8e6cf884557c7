"""Does a packed weight come back unchanged, and is what cannot be packed refused?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vpns_kernels import ConvGeometry, pack, parse_pattern, unpack
from vpns_kernels.formats import validate

GEOMETRIES = {
    "3x3": ConvGeometry(32, 48, (3, 3)),
    "ragged": ConvGeometry(33, 17, (3, 5)),
    "1x1": ConvGeometry(5, 7, (1, 1)),
    "groups": ConvGeometry(8, 16, (3, 3), groups=2),
    "ragged groups": ConvGeometry(6, 8, (1, 3), groups=2),
    "depthwise": ConvGeometry(6, 6, (3, 3), groups=6),
    "one weight": ConvGeometry(1, 1, (1, 1)),
}
SPECS = ["unstructured", "block:4x4", "block:16x16", "block:2x8", "channel", "nm:2:4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def can_pack(geometry: ConvGeometry, spec: str) -> bool:
    if geometry.groups == 1 or spec in ("unstructured", "nm:2:4"):
        return True
    return spec.startswith("block") and geometry.out_channels // geometry.groups % parse_pattern(spec).bk == 0


ROWS = [
    pytest.param(geometry, spec, id=f"{name}-{spec}")
    for name, geometry in GEOMETRIES.items()
    for spec in SPECS
    if can_pack(geometry, spec)
]


def masked_weight(
    geometry: ConvGeometry, spec: str, density: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    pattern, generator = parse_pattern(spec), torch.Generator().manual_seed(4)
    weight = torch.randn(geometry.weight_shape, generator=generator).to(dtype)
    if spec == "channel":
        kept = [torch.rand(n, generator=generator) < density for n in weight.shape[:2]]
        return weight, (kept[0][:, None] & kept[1])[..., None, None].expand_as(weight).contiguous()
    units = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < density
    return weight, pattern.expand(units, geometry.weight_shape).contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("geometry", "spec"), ROWS)
def test_the_kept_weights_come_back_bit_for_bit(
    geometry: ConvGeometry, spec: str, density: float, dtype: torch.dtype
) -> None:
    weight, mask = masked_weight(geometry, spec, density, dtype)
    packed = pack(weight, mask, parse_pattern(spec), geometry)
    validate(packed.values, packed.layout, geometry)
    dense = unpack(packed.values, packed.layout, geometry)
    assert dense.dtype == packed.values.dtype == dtype
    assert torch.equal(dense, torch.where(mask, weight, 0))
    assert 0 <= packed.density <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from(["unstructured", "block:1x1", "block:3x2", "block:8x8"]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_mask_of_any_size_comes_back(K: int, C: int, R: int, S: int, spec: str, seed: int) -> None:
    geometry = ConvGeometry(C, K, (R, S))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(geometry.weight_shape, generator=generator)
    # Blocks keep whatever lies in them, so a mask that cuts through blocks comes back as well.
    mask = torch.rand(weight.shape, generator=generator) < 0.4
    packed = pack(weight, mask, parse_pattern(spec), geometry)
    validate(packed.values, packed.layout, geometry)
    assert torch.equal(unpack(packed.values, packed.layout, geometry), weight * mask)


def test_only_what_is_kept_is_stored() -> None:
    geometry = GEOMETRIES["3x3"]
    for spec in ("unstructured", "block:16x16", "channel"):
        weight, mask = masked_weight(geometry, spec, 0.4)
        packed = pack(weight, mask, parse_pattern(spec), geometry)
        assert packed.values.numel() == int(mask.sum())
        assert packed.density == pytest.approx(float(mask.float().mean()))


def test_a_linear_weight_packs_as_a_1x1_convolution() -> None:
    geometry = ConvGeometry(20, 12, (1, 1))
    weight, mask = torch.randn(12, 20), torch.rand(12, 20) < 0.5
    packed = pack(weight, mask, parse_pattern("unstructured"), geometry)
    assert torch.equal(unpack(packed.values, packed.layout, geometry).view(12, 20), weight * mask)


def test_values_are_stored_in_the_dtype_asked_for() -> None:
    weight, mask = masked_weight(GEOMETRIES["3x3"], "block:16x16", 0.5)
    packed = pack(weight, mask, parse_pattern("block:16x16"), GEOMETRIES["3x3"], torch.bfloat16)
    assert torch.equal(
        unpack(packed.values, packed.layout, GEOMETRIES["3x3"]), (weight * mask).to(torch.bfloat16)
    )


@pytest.mark.parametrize("spec", ["unstructured", "block:4x4", "channel"])
def test_unpack_gives_each_value_its_own_gradient(spec: str) -> None:
    geometry = GEOMETRIES["ragged"]
    packed = pack(*masked_weight(geometry, spec, 0.5), parse_pattern(spec), geometry)
    values = packed.values.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: unpack(v, packed.layout, packed.geometry), values, fast_mode=True
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_kept_weights_that_are_not_finite_are_refused_and_masked_ones_do_not_matter(bad: float) -> None:
    geometry, pattern = ConvGeometry(4, 4, (1, 1)), parse_pattern("block:2x2")
    weight, mask = torch.ones(4, 4, 1, 1), torch.ones(4, 4, 1, 1, dtype=torch.bool)
    mask[:2, :2] = False
    weight[0, 0] = bad
    packed = pack(weight, mask, pattern, geometry)
    assert torch.equal(unpack(packed.values, packed.layout, geometry), mask.float())
    weight[3, 3] = bad
    with pytest.raises(ValueError, match=r"pack: expected weights finite in torch\.float32"):
        pack(weight, mask, pattern, geometry)


def test_weights_that_overflow_their_stored_dtype_are_refused() -> None:
    weight = torch.full((1, 1, 1, 1), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"pack: expected weights finite in torch\.float32"):
        pack(weight, weight != 0, parse_pattern("unstructured"), ConvGeometry(1, 1, (1, 1)), torch.float32)


def test_wrong_weights_and_masks_are_refused() -> None:
    geometry, pattern = ConvGeometry(6, 4, (3, 5)), parse_pattern("unstructured")
    weight = torch.randn(geometry.weight_shape)
    mask = weight > 0
    for wrong in (torch.randn(4, 6, 5, 3), torch.randn(6, 4, 3, 5), torch.randn(4, 90), torch.randn(4, 6, 3)):
        with pytest.raises(ValueError, match=r"pack: expected a weight \[4, 6, 3, 5\]"):
            pack(wrong, wrong > 0, pattern, geometry)
    for wrong in (mask[:3], mask.flatten(), mask.float(), mask.to(torch.uint8), mask.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"pack: expected a bool mask \[4, 6, 3, 5\]"):
            pack(weight, wrong, pattern, geometry)
    with pytest.raises(TypeError, match="pack: expected values in one of"):
        pack(weight.int(), mask, pattern, geometry)


def test_masks_that_break_their_pattern_are_refused() -> None:
    geometry = ConvGeometry(6, 4, (3, 3))
    mask = torch.ones(geometry.weight_shape, dtype=torch.bool)
    mask[1, 2, 0, 1] = False
    with pytest.raises(ValueError, match="expected a mask of whole channels"):
        pack(torch.randn(geometry.weight_shape), mask, parse_pattern("channel"), geometry)
    grouped = ConvGeometry(4, 6, (1, 1), groups=2)
    weight = torch.randn(grouped.weight_shape)
    with pytest.raises(NotImplementedError, match="expected bk to divide a group's 3 filters, got 2"):
        pack(weight, weight > 0, parse_pattern("block:2x2"), grouped)
    with pytest.raises(NotImplementedError, match="expected groups 1, got 2"):
        pack(weight, weight > 0, parse_pattern("channel"), grouped)
