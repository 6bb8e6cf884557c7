"""What is special about sparse_conv2d: each native kernel, torch's contracts, determinism, NaN, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vpns_kernels import OPS, ConvGeometry, native, pack, parse_pattern, sparse_conv2d, unpack
from vpns_kernels.ops._cpu import Prepared
from vpns_kernels.testing import conv_excess

CASES = OPS["sparse_conv2d"].cases()
LIBRARY = native.library()
KERNELS = LIBRARY.sparse_conv2d_kernels(True)


def schema_args(args: dict[str, Any], backends: list[str]) -> tuple[Any, ...]:
    g = args["geometry"]
    layout = list(args["layout"])
    sizes = (list(g.weight_shape), list(g.stride), list(g.padding), list(g.dilation), g.groups)
    return args["x"], args["values"], layout, args["bias"], *sizes, backends


def layer(spec: str, density: float = 0.2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    geometry, pattern = ConvGeometry(48, 32, (3, 3), padding=(1, 1)), parse_pattern(spec)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(geometry.weight_shape, generator=generator).to(dtype)
    units = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < density
    packed = pack(weight, pattern.expand(units, geometry.weight_shape).contiguous(), pattern, geometry)
    x = torch.randn(17, 48, 9, 10, generator=generator).to(dtype)
    return {"x": x, "values": packed.values, "layout": packed.layout, "geometry": geometry}


def takes(kernel: str, values: torch.Tensor, x: torch.Tensor, geometry: ConvGeometry) -> bool:
    """What the kernels promise: scalar everything, amx and bf16 what can be bf16, others float32 sums."""
    if kernel == "scalar":
        return True
    if kernel.startswith("depthwise"):
        is_depthwise = geometry.groups == geometry.in_channels == geometry.out_channels
        return is_depthwise and values.dim() == 1 and x.dtype != torch.float64
    if kernel.startswith("grouped"):
        is_narrow = geometry.groups > 1 and geometry.in_channels // geometry.groups in (4, 8)
        is_whole = values.numel() == math.prod(geometry.weight_shape)
        is_taken = x.dtype == torch.bfloat16 if "bf16" in kernel else x.dtype != torch.float64
        return values.dim() == 3 and is_narrow and is_whole and is_taken
    family = {1: "unstructured", 3: "block", 4: "channel"}[values.dim()]
    if not kernel.startswith(f"{family}_") or x.dtype == torch.float64:
        return False
    if "fp16" in kernel:
        return x.dtype in (torch.float16, torch.bfloat16)
    if "amx" not in kernel and "bf16" not in kernel:
        return True
    if values.dtype not in (torch.bfloat16, torch.float32) or x.dtype != torch.bfloat16:
        return False
    return "amx" not in kernel or family != "block" or all(size % 16 == 0 for size in values.shape[1:])


@pytest.mark.skipif(
    not (native.has_isa("avx512_bf16") or native.has_isa("amx")), reason="this CPU does not multiply bfloat16"
)
@pytest.mark.parametrize("spec", ["block:16x16", "block:32x32", "channel"])
def test_float32_masters_meet_bfloat16_inputs_in_bfloat16(spec: str) -> None:
    made = layer(spec)
    x = made["x"].bfloat16().requires_grad_(True)
    masters = made["values"].requires_grad_(True)
    y = sparse_conv2d(x, masters, made["layout"], made["geometry"])
    rounded = sparse_conv2d(x, masters.bfloat16(), made["layout"], made["geometry"])
    assert torch.equal(y, rounded)
    grad = torch.randn_like(y)
    found, expected = (torch.autograd.grad(out, (x, masters), grad) for out in (y, rounded))
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.float32
    assert torch.allclose(found[1], expected[1], rtol=0.02, atol=0.02 * float(expected[1].abs().max()))
    # Nothing of it is kept for a kernel that was asked for by its name.
    full = Prepared(masters, made["layout"], made["geometry"], x.shape, x.dtype, "scalar").run(x, None)
    assert not torch.equal(full, y)


def test_single_weights_stay_in_float32_whatever_the_input() -> None:
    made = layer("unstructured")
    x, values = made["x"].bfloat16(), made["values"]
    y = sparse_conv2d(x, values, made["layout"], made["geometry"])
    assert not torch.equal(y, sparse_conv2d(x, values.bfloat16(), made["layout"], made["geometry"]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_native_kernel_meets_the_bound_on_every_case_it_takes(kernel: str) -> None:
    taken = 0
    for case in CASES:
        args = case.build()
        x, values, layout, geometry = (args[name] for name in ("x", "values", "layout", "geometry"))
        if not takes(kernel, values, x, geometry):
            with pytest.raises(ValueError, match=kernel):
                Prepared(values, layout, geometry, x.shape, x.dtype, kernel)
            continue
        prepared = Prepared(values, layout, geometry, x.shape, x.dtype, kernel)
        assert prepared.kernel == kernel
        y = prepared.run(x, args["bias"])
        weight = unpack(values, layout, geometry)
        excess = conv_excess(y, x, weight, args["bias"], geometry, half_sums="fp16" in kernel)
        assert excess <= 1, case.name
        taken += 1
    assert taken >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["block:32x2", "channel"])
def test_outputs_too_large_for_the_caches(spec: str, dtype: torch.dtype) -> None:
    geometry, pattern = ConvGeometry(4, 256, (1, 1)), parse_pattern(spec)
    weight = torch.randn(geometry.weight_shape).to(dtype)
    units = torch.rand(pattern.units_shape(geometry.weight_shape)) < 0.7
    mask = pattern.expand(units, geometry.weight_shape).contiguous()
    packed = pack(weight, mask, pattern, geometry)
    x, bias = torch.randn(1, 4, 181, 182).to(dtype), torch.randn(256)
    args = packed.values, packed.layout, geometry, x.shape, dtype
    prepared = Prepared(*args)
    y = prepared.run(x, bias)
    assert y.numel() * y.element_size() > 16 << 20
    assert conv_excess(y, x, weight * mask, bias, geometry) <= 1, prepared.kernel


@pytest.mark.parametrize("isa", LIBRARY.isa_list())
def test_a_lower_instruction_set_can_be_forced(isa: str) -> None:
    LIBRARY.isa_cap(isa)
    try:
        assert LIBRARY.isa_list()[-1] == isa
        args = layer("unstructured")
        prepared = Prepared(args["values"], args["layout"], args["geometry"], args["x"].shape, torch.float32)
        assert prepared.kernel == ("scalar" if isa == "scalar" else prepared.kernel)
        assert torch.allclose(
            prepared.run(args["x"], None), sparse_conv2d(**args, backend="reference"), atol=1e-4
        )
    finally:
        LIBRARY.isa_cap("")


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "block:32x32"])
def test_results_are_bitwise_equal_from_run_to_run_and_for_any_thread_count(spec: str) -> None:
    args = layer(spec)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = sparse_conv2d(**args)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(sparse_conv2d(**args), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", ["unstructured", "block:16x16"])
def test_opcheck(spec: str, backend: str) -> None:
    args = layer(spec) | {"bias": torch.randn(32)}
    for name in ("x", "values", "bias"):
        args[name] = args[name].requires_grad_()
    torch.library.opcheck(
        torch.ops.vpns.sparse_conv2d.default, schema_args(args, [backend, backend, "reference"])
    )


@pytest.mark.parametrize("backend", ["cpu", "compact", "reference"])
def test_gradients_in_float64(backend: str) -> None:
    # On the cpu backend float64 runs the scalar kernel.
    spec = "channel" if backend == "compact" else "block:2x2"
    geometry, pattern = ConvGeometry(3, 4, (3, 2), (2, 1), (1, 0), (1, 2)), parse_pattern(spec)
    weight = torch.randn(geometry.weight_shape, dtype=torch.float64)
    units = torch.tensor([True, True, False, True])
    keep = units if spec == "channel" else torch.rand(pattern.units_shape(geometry.weight_shape)) < 0.6
    packed = pack(weight, pattern.expand(keep, geometry.weight_shape).contiguous(), pattern, geometry)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    values = packed.values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, v, b: sparse_conv2d(x, v, packed.layout, geometry, b, (backend, backend, "auto")),
        (x, values, bias),
    )


def test_a_second_derivative_is_a_clear_error() -> None:
    args = layer("unstructured")
    x = args["x"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match="expected a first derivative, got a request for the second"
    ):
        torch.autograd.grad(sparse_conv2d(**args).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16"])
def test_compiles_and_exports_as_one_graph(spec: str) -> None:
    args = layer(spec)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sparse_conv2d(x, args["values"], args["layout"], args["geometry"]).relu()

    expected = Layer()(args["x"])
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args["x"]), expected)
    exported = torch.export.export(Layer(), (args["x"],))
    assert torch.equal(exported.module()(args["x"]), expected)


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16"])
def test_nan_reaches_only_outputs_that_a_kept_weight_connects_with_it(spec: str) -> None:
    args = layer(spec, density=0.05)
    x = args["x"].clone()
    x[3, 5, 4, 4] = float("nan")
    weight = unpack(args["values"], args["layout"], args["geometry"])
    poisoned = torch.zeros_like(x)
    poisoned[3, 5, 4, 4] = 1.0
    kept = (
        (weight != 0)
        if spec == "unstructured"
        else parse_pattern(spec).expand(
            parse_pattern(spec).reduce_sum((weight != 0).float()) > 0, tuple(weight.shape)
        )
    )
    reached = torch.nn.functional.conv2d(poisoned, kept.float(), padding=1) > 0
    y = sparse_conv2d(**(args | {"x": x}))
    assert torch.equal(y.isnan(), reached)


def test_bad_arguments_are_refused_with_a_reason() -> None:
    args = layer("unstructured")
    with pytest.raises(ValueError, match=r"expected x \[N, 48, H, W\]"):
        sparse_conv2d(**(args | {"x": torch.randn(1, 47, 9, 9)}))
    with pytest.raises(ValueError, match=r"expected bias \[32\]"):
        sparse_conv2d(**args, bias=torch.randn(31))
    narrow = replace(args["geometry"], padding=(0, 0))
    with pytest.raises(ValueError, match="at least 3 pixels"):
        sparse_conv2d(**(args | {"x": torch.randn(1, 48, 2, 9), "geometry": narrow}))
    with pytest.raises(NotImplementedError, match="float64 with float64 only"):
        sparse_conv2d(**(args | {"x": args["x"].double()}), backend="cpu")


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "channel"])
def test_hostile_layouts_are_refused(spec: str) -> None:
    geometry, pattern = ConvGeometry(48, 32, (3, 3), padding=(1, 1)), parse_pattern(spec)
    units = torch.rand(pattern.units_shape(geometry.weight_shape)) < 0.5
    mask = pattern.expand(units, geometry.weight_shape).contiguous()
    packed = pack(torch.randn(geometry.weight_shape), mask, pattern, geometry)
    backend = "compact" if spec == "channel" else "cpu"
    for number, array in enumerate(packed.layout):
        for position in (0, array.numel() // 2, array.numel() - 1):
            neighbour = int(array[position - 1 if position else 1])
            for hostile in {-1, 2**31 - 1, neighbour} - {int(array[position])}:
                broken = array.clone()
                broken[position] = hostile
                layout = [*packed.layout[:number], broken, *packed.layout[number + 1 :]]
                with pytest.raises(ValueError, match="layout: expected"):
                    sparse_conv2d(torch.randn(1, 48, 5, 5), packed.values, layout, geometry, backend=backend)
