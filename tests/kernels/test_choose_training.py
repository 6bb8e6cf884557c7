"""The choice of backends in training is pure, complete, and follows the density."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vpns_kernels import ConvGeometry, pack, parse_pattern, sparse_conv2d
from vpns_kernels.choose import Machine, query_of, this_machine
from vpns_kernels.choose_training import choose_training, transposed
from vpns_kernels.cost import CLASSES, LayerQuery, cost_table

GEOMETRY = ConvGeometry(128, 128, (3, 3), padding=(1, 1))
SIZES = {"unstructured": (147456,), "block": (144, 32, 32), "channel": (128, 128, 3, 3)}


def machine(isa: str) -> Machine:
    """One that has the kernels of its class."""
    wide = "avx512" if CLASSES.index(isa) >= CLASSES.index("avx512") else "avx2"
    return Machine(isa, 2, lambda query: [(f"{query.format}_{wide}", ""), ("scalar", "")], "amd25")


def query(format: str, density: float, dtype: str = "float32") -> LayerQuery:
    return LayerQuery(GEOMETRY, (32, 28, 28), SIZES[format], dtype).at_density(density)


@pytest.mark.parametrize("isa", CLASSES[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", SIZES)
def test_each_pass_is_sparse_up_to_some_density_and_dense_from_there(
    format: str, dtype: str, isa: str
) -> None:
    densities = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    found = [choose_training(query(format, d, dtype), machine(isa)) for d in densities]
    for of_pass in range(3):
        is_sparse = [choice.backends[of_pass] != "reference" for choice in found]
        assert is_sparse == sorted(is_sparse, reverse=True)
        # Tiles multiply bfloat16 too fast for single weights.
        assert is_sparse[0] or dtype == "bfloat16"
    times = [choice.weight_gradient.est_ms for choice in found]
    assert times == sorted(times)


def test_the_choice_is_pure() -> None:
    asked, here = query("unstructured", 0.1), machine("avx512")
    first = choose_training(asked, here)
    assert choose_training(asked, here) == first
    assert choose_training(asked, here, dict(cost_table())) == first


@pytest.mark.parametrize("isa", CLASSES[1:])
def test_a_class_never_measured_says_so(isa: str) -> None:
    row = "gradient unstructured"
    candidates = choose_training(query("unstructured", 0.1), machine(isa)).weight_gradient.candidates
    known = cost_table()["classes"].get(f"{isa} amd25", {"kernels": {}})["kernels"]
    expected = next(c.estimate for c in candidates if c.kernel == row)
    assert expected is not None
    assert expected.measured == (row in known)


def test_what_has_no_native_gradient_is_dense_and_says_why() -> None:
    scalar = Machine("scalar", 2, lambda query: [("scalar", "")])
    assert "need avx2" in choose_training(query("unstructured", 0.1), scalar).weight_gradient.reason
    double = replace(query("block", 0.1, "float64"), weight_dtype="float64")
    assert "float32" in choose_training(double, machine("avx512")).weight_gradient.reason
    scores = choose_training(query("channel", 0.1), machine("avx512"), with_scores=True)
    assert "no weight gradient" in scores.weight_gradient.reason


@pytest.mark.parametrize("format", ["block", "unstructured"])
def test_scores_cost_the_same_at_any_density(format: str) -> None:
    here = machine("avx512")
    found = [choose_training(query(format, d), here, with_scores=True).weight_gradient for d in (0.05, 0.5)]
    assert found[0].est_ms == found[1].est_ms
    assert [c.kernel for c in found[0].candidates] == ["dense scores float32", f"score {format} float32"]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_transposed_layer_multiplies_as_often(stride: int) -> None:
    geometry = ConvGeometry(64, 128, (3, 3), (stride, stride), (1, 1))
    asked = LayerQuery(geometry, (4, 56, 56), (99, 16, 32))
    found = transposed(asked)
    assert found.values_sizes == (99, 32, 16)
    assert found.geometry.output_size(*found.size[1:]) == (56 // stride, 56 // stride)
    assert transposed(replace(asked, values_sizes=(100, 50, 3, 3))).values_sizes == (50, 100, 3, 3)


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "channel"])
def test_the_chosen_backends_run(spec: str) -> None:
    geometry, pattern = ConvGeometry(32, 32, (3, 3), padding=(1, 1)), parse_pattern(spec)
    units = torch.rand(pattern.units_shape(geometry.weight_shape)) < 0.5
    mask = pattern.expand(units, geometry.weight_shape).contiguous()
    packed = pack(torch.randn(geometry.weight_shape), mask, pattern, geometry)
    x: Any = torch.randn(2, 32, 7, 7, requires_grad=True)
    choice = choose_training(query_of(geometry, x.shape, packed.values, x.dtype), this_machine())
    values = packed.values.requires_grad_()
    y = sparse_conv2d(x, values, packed.layout, geometry, backend=choice.backends)
    y.sum().backward()
    assert x.grad is not None
    assert values.grad is not None
