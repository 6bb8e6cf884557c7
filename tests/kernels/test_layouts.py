"""Is a damaged layout refused, before any kernel sees it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vpns_kernels import ConvGeometry, Packed, pack, parse_pattern
from vpns_kernels.formats import validate

Damage = Callable[[Packed], tuple[Tensor, list[Tensor]]]


def packed_layer(spec: str, density: float = 0.5) -> Packed:
    """33 → 17 channels, 3×5: ragged in both directions for blocks of 4."""
    geometry, pattern = ConvGeometry(33, 17, (3, 5)), parse_pattern(spec)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(geometry.weight_shape, generator=generator)
    units = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < density
    return pack(weight, pattern.expand(units, geometry.weight_shape).contiguous(), pattern, geometry)


def change(number: int, edit: Callable[[Tensor], Tensor]) -> Damage:
    """A damage to one array of a layout."""

    def damage(packed: Packed) -> tuple[Tensor, list[Tensor]]:
        layout = list(packed.layout)
        layout[number] = edit(layout[number].clone())
        return packed.values, layout

    return damage


def swapped(array: Tensor) -> Tensor:
    return torch.cat([array[1:2], array[:1], array[2:]])


def put(place: int, value: int) -> Callable[[Tensor], Tensor]:
    def edit(array: Tensor) -> Tensor:
        array[place] = value
        return array

    return edit


def overflow(array: Tensor) -> Tensor:
    """In 32 bits every difference is positive."""
    array[1:4] = torch.tensor([2**31 - 1, -(2**31), -1])
    return array


DAMAGES: dict[str, Damage] = {
    "values too few": lambda p: (p.values[:-1], list(p.layout)),
    "values too many": lambda p: (torch.cat([p.values, p.values[:1]]), list(p.layout)),
    "values of no format": lambda p: (p.values.reshape(-1, 1), list(p.layout)),
    "values integer": lambda p: (p.values.int(), list(p.layout)),
    "values of integers": lambda p: (p.values.int(), list(p.layout)),
    "array missing": lambda p: (p.values, list(p.layout[:-1])),
    "array too many": lambda p: (p.values, [*p.layout, p.layout[0]]),
    "no arrays": lambda p: (p.values, []),
}
for _number in range(5):
    DAMAGES |= {
        f"array {_number} of int64": change(_number, lambda a: a.long()),
        f"array {_number} of floats": change(_number, lambda a: a.float()),
        f"array {_number} of two dimensions": change(_number, lambda a: a[None]),
        f"array {_number} too short": change(_number, lambda a: a[:-1]),
        f"array {_number} too long": change(_number, lambda a: torch.cat([a, a[-1:]])),
        f"array {_number} with a negative entry": change(_number, put(0, -1)),
        f"array {_number} with a huge entry": change(_number, put(-1, 2**31 - 1)),
        f"array {_number} whose steps overflow": change(_number, overflow),
        f"array {_number} out of order": change(_number, swapped),
        f"array {_number} with a double": change(_number, lambda a: torch.cat([a[:1], a[:1], a[2:]])),
    }


# Channel layouts have two arrays only.
ROWS = [
    (spec, name)
    for spec in ("unstructured", "block:4x4", "channel")
    for name in DAMAGES
    if spec != "channel" or not name.startswith(("array 2", "array 3", "array 4"))
]


@pytest.mark.parametrize(("spec", "name"), ROWS)
def test_every_damage_is_refused(spec: str, name: str) -> None:
    packed = packed_layer(spec)
    values, layout = DAMAGES[name](packed)
    with pytest.raises(ValueError, match="layout: expected"):
        validate(values, layout, packed.geometry)


@pytest.mark.parametrize("spec", ["unstructured", "block:4x4", "channel"])
def test_a_layout_of_another_geometry_is_refused(spec: str) -> None:
    packed = packed_layer(spec, density=1.0)
    for other in (
        replace(packed.geometry, in_channels=packed.geometry.in_channels - 4),
        replace(packed.geometry, out_channels=packed.geometry.out_channels - 4),
        replace(packed.geometry, kernel_size=(5, 3)),
        replace(packed.geometry, kernel_size=(3, 4)),
    ):
        if spec != "channel" and other.kernel_size == (5, 3):
            continue  # as many taps: the flat index fits both
        with pytest.raises(ValueError, match="layout: expected"):
            validate(packed.values, packed.layout, other)


def test_blocks_of_no_size_are_refused() -> None:
    packed = packed_layer("block:4x4", density=0.0)
    for shape in ((0, 0, 4), (0, 4, 0)):
        with pytest.raises(ValueError, match="expected blocks of at least 1x1"):
            validate(torch.empty(shape), packed.layout, packed.geometry)
