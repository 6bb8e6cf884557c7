"""What is special about sparse_conv2d_fused: native kernels, tracing, NaN, determinism, refusals."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels import OPS, ConvGeometry, native, pack, parse_pattern, sparse_conv2d_fused, unpack
from vpns_kernels.ops import _cpu
from vpns_kernels.ops._cpu import Prepared
from vpns_kernels.testing import conv_excess, poisoned_memory

CASES = OPS["sparse_conv2d_fused"].cases()
KERNELS = native.library().sparse_conv2d_kernels(True)
SPECS = ["unstructured", "block:16x16", "channel"]
BACKENDS = ["cpu", "compact", "reference"]
OUT = (17, 32, 9, 10)


def layer(spec: str, density: float = 0.2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    C, groups = {"depthwise": (32, 32), "grouped": (32, 8)}.get(spec, (48, 1))
    density = 1.0 if spec == "grouped" else density
    geometry = ConvGeometry(C, 32, (3, 3), padding=(1, 1), groups=groups)
    pattern = parse_pattern({"depthwise": "unstructured", "grouped": "block:4x4"}.get(spec, spec))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(geometry.weight_shape, generator=generator).to(dtype)
    if spec == "channel":
        keep = torch.rand(32, generator=generator) < density, torch.rand(48, generator=generator) < density
        mask = (keep[0][:, None] & keep[1])[..., None, None].expand_as(weight).contiguous()
    else:
        units = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < density
        mask = pattern.expand(units, geometry.weight_shape).contiguous()
    packed = pack(weight, mask, pattern, geometry)
    return {
        "x": torch.randn(17, C, 9, 10, generator=generator).to(dtype),
        "values": packed.values,
        "layout": packed.layout,
        "geometry": geometry,
        "bias": torch.randn(32, generator=generator).to(dtype),
        "residual": torch.randn(OUT, generator=generator).to(dtype),
        "act": "relu",
    }


def schema_args(args: dict[str, Any], backend: str) -> tuple[Any, ...]:
    g = args["geometry"]
    sizes = (list(g.weight_shape), list(g.stride), list(g.padding), list(g.dilation), g.groups)
    inputs = (args["x"], args["values"], list(args["layout"]), args["bias"], args["residual"])
    return *inputs, *sizes, args["act"], args.get("out_dtype") or args["x"].dtype, backend


def can_run(args: dict[str, Any], backend: str) -> bool:
    reason = OPS["sparse_conv2d_fused"].module(backend).why_not(args["x"], args["values"])
    return bool(reason is None)


def backends_of(spec: str) -> list[str]:
    return [backend for backend in BACKENDS if can_run(layer(spec), backend)]


@pytest.fixture
def _one_and_more_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_native_kernel_meets_the_bound_on_every_case_it_takes(kernel: str) -> None:
    taken = 0
    for case in CASES:
        args = case.build()
        x, values, layout, geometry, bias = (
            args[name] for name in ("x", "values", "layout", "geometry", "bias")
        )
        try:
            prepared = Prepared(values, layout, geometry, x.shape, x.dtype, kernel)
        except ValueError:
            continue
        residual, act = args.get("residual"), args["act"]
        with poisoned_memory():
            y = prepared.run(x, bias, residual, act, args["out_dtype"])
        weight = unpack(values, layout, geometry)
        half_sums = "fp16" in kernel
        assert conv_excess(y, x, weight, bias, geometry, residual, act, half_sums) <= 1, case.name
        taken += 1
    assert taken >= (1 if "fp16" in kernel else 4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("_one_and_more_threads")
def test_results_are_bitwise_equal_over_100_runs_for_one_and_more_threads(
    spec: str, dtype: torch.dtype
) -> None:
    args = layer(spec, dtype=dtype)
    torch.set_num_threads(1)
    x, kernel = args["x"], "scalar" if spec == "channel" and not can_run(args, "cpu") else ""
    prepared = Prepared(args["values"], args["layout"], args["geometry"], x.shape, x.dtype, kernel)
    first = prepared.run(x, args["bias"], args["residual"], "relu6")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(100 if kernel != "scalar" else 10):
            assert torch.equal(prepared.run(x, args["bias"], args["residual"], "relu6"), first)
    for backend in backends_of(spec)[:1]:
        if backend == "cpu":
            assert torch.equal(sparse_conv2d_fused(**args | {"act": "relu6"}), first)


@pytest.mark.parametrize(("spec", "backend"), [(s, b) for s in SPECS for b in backends_of(s)])
def test_opcheck(spec: str, backend: str) -> None:
    args = layer(spec)
    op = torch.ops.vpns.sparse_conv2d_fused.default
    for change in ({}, {"residual": None, "bias": None, "act": "none"}, {"act": "relu6"}):
        torch.library.opcheck(op, schema_args(args | change, backend))
    half = args | {"out_dtype": torch.float16, "residual": args["residual"].half()}
    torch.library.opcheck(op, schema_args(half, backend))


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_and_exports_as_one_graph_with_any_batch(spec: str) -> None:
    args = layer(spec)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            y = sparse_conv2d_fused(
                x, args["values"], args["layout"], args["geometry"], args["bias"], residual, "relu6"
            )
            return y + 1

    inputs = [(args["x"][:n], args["residual"][:n]) for n in (17, 5, 3)]
    expected = [Layer()(*pair) for pair in inputs]
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Layer(), inputs[0], dynamic_shapes=({0: batch}, {0: batch})).module()
    for pair, y in zip(inputs, expected, strict=True):
        assert torch.equal(compiled(*pair), y)
        assert torch.equal(exported(*pair), y)


@pytest.mark.parametrize("name", ["x", "values", "bias", "residual"])
def test_asking_for_a_gradient_is_a_clear_error(name: str) -> None:
    args = layer("unstructured")
    args[name].requires_grad_()
    y = sparse_conv2d_fused(**args)
    with pytest.raises(NotImplementedError, match=r"expected inference.*sparse_conv2d is differentiable"):
        y.sum().backward()
    with torch.no_grad():
        assert not sparse_conv2d_fused(**args).requires_grad


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_nan_and_infinity_of_x_act_as_in_a_layer_of_the_kept_weights_alone(
    spec: str, bad: float, act: str
) -> None:
    args = layer(spec, density=0.05 if spec != "channel" else 0.5) | {"act": act}
    x, geometry = args["x"].clone(), args["geometry"]
    weight = unpack(args["values"], args["layout"], geometry)
    kept = unpack(torch.ones_like(args["values"]), args["layout"], geometry)
    channel = int(kept.sum((0, 2, 3)).argmax())
    x[3, channel, 4, 4] = bad
    # An impulse in place of the bad number tells which outputs it reaches and with which sign.
    impulse = torch.zeros_like(x)
    impulse[3, channel, 4, 4] = 1.0
    is_reached = F.conv2d(impulse, kept, padding=1) > 0
    clean = torch.where(impulse > 0, 0.0, x)
    y = F.conv2d(clean, weight, args["bias"], padding=1) + args["residual"]
    y = torch.where(is_reached, y + bad * F.conv2d(impulse, weight, padding=1), y)
    expected = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[act](y)
    assert bool(is_reached.any())
    assert not bool(is_reached.all())
    for backend in backends_of(spec):
        if backend != "reference":
            found = sparse_conv2d_fused(**args | {"x": x}, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_nan_in_a_residual_passes_every_activation_and_reaches_its_own_output_alone(
    kernel: str, act: str
) -> None:
    family = kernel.partition("_")[0]
    specs = {"channel": "channel", "depthwise": "depthwise", "grouped": "grouped", "block": "block:16x16"}
    spec = specs.get(family, SPECS[0])
    taken = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = layer(spec, dtype=dtype)
        x = args["x"]
        try:
            prepared = Prepared(args["values"], args["layout"], args["geometry"], x.shape, dtype, kernel)
        except ValueError:
            continue
        taken += 1
        residual = args["residual"].clone()
        places = [(0, 0, 0, 0), (5, 17, 3, 4), (16, 31, 8, 9)]
        for place in places:
            residual[place] = float("nan")
        is_nan = prepared.run(x, args["bias"], residual, act).isnan()
        assert is_nan.nonzero().tolist() == [list(place) for place in places]
    assert taken >= 1


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_none_and_a_layer_of_none(spec: str) -> None:
    args = layer(spec, density=0.0)
    assert args["values"].numel() == 0
    expected = F.relu(args["bias"].view(1, -1, 1, 1) + args["residual"])
    empty = args | {"x": args["x"][:0], "residual": args["residual"][:0]}
    for backend in backends_of(spec):
        torch.testing.assert_close(sparse_conv2d_fused(**args, backend=backend), expected, rtol=0, atol=0)
        assert sparse_conv2d_fused(**empty, backend=backend).shape == (0, *OUT[1:])


def test_float16_beyond_its_range_becomes_infinity_as_in_torch() -> None:
    args = layer("unstructured", dtype=torch.float16) | {"act": "none"}
    args["residual"] = torch.full_like(args["residual"], 65504.0)
    args["bias"] = torch.full_like(args["bias"], 1000.0)
    for backend in ("cpu", "reference"):
        assert bool((sparse_conv2d_fused(**args, backend=backend) == float("inf")).all())


def test_bad_arguments_are_refused_with_a_reason() -> None:
    args = layer("unstructured")
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"expected x \[N, 48, H, W\]", {"x": torch.randn(1, 47, 9, 9)}),
        (TypeError, "expected x in one of", {"x": args["x"].int()}),
        (ValueError, r"expected bias \[32\]", {"bias": torch.randn(31)}),
        (ValueError, r"expected act in \('none', 'relu', 'relu6'\), got 'gelu'", {"act": "gelu"}),
        (ValueError, r"expected residual \[17, 32, 9, 10\]", {"residual": torch.randn(17, 32, 9, 9)}),
        (TypeError, "expected residual in torch.float32", {"residual": args["residual"].half()}),
        (TypeError, "expected out_dtype in", {"out_dtype": torch.float64}),
        (TypeError, "expected out_dtype in", {"x": args["x"].double(), "out_dtype": torch.float32}),
    ]
    for kind, message, change in wrong:
        with pytest.raises(kind, match=message):
            sparse_conv2d_fused(**args | change)
    double = args | {"x": args["x"].double(), "residual": None}
    with pytest.raises(NotImplementedError, match="float64 with float64 only"):
        sparse_conv2d_fused(**double, backend="cpu")
    with pytest.raises(NotImplementedError, match="it takes channel-pruned weights"):
        sparse_conv2d_fused(**args, backend="compact")


def test_weights_that_are_not_finite_are_refused_when_packed() -> None:
    geometry, pattern = ConvGeometry(4, 4, (1, 1)), parse_pattern("unstructured")
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = False
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = torch.randn(4, 4)
        weight[0, 0] = bad
        assert bool(pack(weight, mask, pattern, geometry).values.isfinite().all())
        weight[1, 2] = bad
        with pytest.raises(
            ValueError, match=r"pack: expected weights finite in torch.float32, got NaN or inf"
        ):
            pack(weight, mask, pattern, geometry)
    with pytest.raises(ValueError, match=r"pack: expected weights finite in torch.float16"):
        pack(torch.full((4, 4), 70000.0), mask, pattern, geometry, torch.float16)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Prepared]]:
    """Every prepared form that is made in a test, alive or not."""
    made: list[weakref.ref[Prepared]] = []

    def make(*args: Any) -> Prepared:
        one = Prepared(*args)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(_cpu.prepared, "Prepared", make)
    return made


@torch.no_grad()
def test_weights_are_prepared_once_in_eager_compiled_and_exported_calls(
    prepared: list[weakref.ref[Prepared]],
) -> None:
    args = layer("unstructured")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(args["values"].clone())
            self.index = torch.nn.ParameterList(
                torch.nn.Parameter(a, requires_grad=False) for a in args["layout"]
            )

        def forward(self, x: Tensor) -> Tensor:
            return sparse_conv2d_fused(x, self.values, list(self.index), args["geometry"], act="relu")

    eager, x = Layer(), args["x"]
    expected = eager(x)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(eager, (x,)).module()
    for run in (eager, compiled, exported):
        run(x)
        count = len(prepared)
        for _ in range(5):
            assert torch.equal(run(x), expected)
        assert len(prepared) == count
    eager.values.mul_(2)
    assert torch.equal(eager(x), 2 * expected)
    assert torch.equal(compiled(x), 2 * expected)
    # Leaves no trace, yet is common in code that trains.
    eager.values.data.mul_(2)
    assert torch.equal(eager(x), 4 * expected)


@torch.no_grad()
def test_what_is_prepared_goes_with_the_weights(prepared: list[weakref.ref[Prepared]]) -> None:
    args = layer("unstructured")
    sparse_conv2d_fused(**args)
    assert prepared[0]() is not None
    args.clear()
    gc.collect()
    assert prepared[0]() is None


@torch.no_grad()
def test_a_layout_that_was_good_and_is_changed_is_refused() -> None:
    args = layer("unstructured")
    sparse_conv2d_fused(**args)
    args["layout"][1][3] = -1
    with pytest.raises(ValueError, match="layout: expected"):
        sparse_conv2d_fused(**args)
    args = layer("unstructured")
    sparse_conv2d_fused(**args)
    narrow = ConvGeometry(48, 31, (3, 3), padding=(1, 1))
    change = {"geometry": narrow, "bias": None, "residual": None}
    with pytest.raises(ValueError, match="layout: expected"):
        sparse_conv2d_fused(**args | change)
