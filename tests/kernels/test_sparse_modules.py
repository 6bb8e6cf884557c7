"""Do packed layers equal the dense ones, and does what they keep prepared notice every change?"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.pruned_layers import (
    DTYPES,
    SPECS,
    assert_is_right,
    prune,
    pruned_conv,
    sparse_conv,
)
from vpns_kernels import ConvGeometry, parse_pattern, runners
from vpns_kernels.choose import Choice
from vpns_kernels.ops import _cpu
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear, layout_names


@pytest.fixture(autouse=True)
def _sparse_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers would run dense; here kernels are tested, in test_choose.py the choice."""
    choice = Choice("", 1.0, 1.0, "as the op chooses", ())
    monkeypatch.setattr(runners, "choose", lambda *_, **__: choice)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "bias": False}, {"kernel_size": 1, "padding": 0}, {"dilation": 2, "stride": (1, 3)}],
    ids=str,
)
def test_a_sparse_convolution_equals_the_dense_one(options: dict[str, Any], spec: str) -> None:
    conv, mask = pruned_conv(spec, **options)
    layer = SparseConv2d.from_dense(conv, mask, parse_pattern(spec))
    x = torch.randn(9, 24, 10, 8)
    assert torch.equal(layer.dense_weight(), conv.weight.detach())
    with_grad = layer(x)
    with torch.no_grad():
        for y in (with_grad, layer(x), layer(x.contiguous(memory_format=torch.channels_last))):
            assert_is_right(layer, x, y)
            assert y.shape == conv(x).shape
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spec", ["channel", "block:8x4", "unstructured"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_weight_that_is_zero_by_chance_is_kept_with_its_unit(kind: str, spec: str) -> None:
    dense = nn.Conv2d(16, 24, 3) if kind == "conv" else nn.Linear(16, 24)
    with torch.no_grad():
        # Eight outputs and four inputs are pruned; two other weights happen to be zero.
        dense.weight[8:16] = 0
        dense.weight[:, 4:8] = 0
        dense.weight[0, 0] = 0
        dense.weight.flatten()[-1] = 0
    make = SparseConv2d.from_dense if kind == "conv" else SparseLinear.from_dense
    layer = make(dense, pattern=spec)  # type: ignore[arg-type]
    assert layer.pattern == parse_pattern(spec)
    assert torch.equal(layer.dense_weight().view_as(dense.weight), dense.weight)
    pruned = 16 * 12 * dense.weight[0, 0].numel()
    by_chance = 0 if spec != "unstructured" else 1 + dense.weight[0, 0].numel()
    assert layer.values.numel() == pruned - by_chance
    x = torch.randn(2, 16, 5, 5) if kind == "conv" else torch.randn(2, 16)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("groups", [2, 24])
def test_grouped_convolutions_equal_the_dense_one(groups: int) -> None:
    torch.manual_seed(8)
    conv = nn.Conv2d(24, 48, 3, padding=1, groups=groups)
    prune(conv, "unstructured")
    layer = SparseConv2d.from_dense(conv)
    with torch.no_grad():
        x = torch.randn(3, 24, 6, 6)
        assert_is_right(layer, x, layer(x))
        assert torch.equal(layer.dense_weight(), conv.weight)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
def test_a_sparse_linear_equals_the_dense_one(shape: tuple[int, ...], spec: str) -> None:
    torch.manual_seed(9)
    linear = nn.Linear(24, 10)
    layer = SparseLinear.from_dense(linear, prune(linear, spec), parse_pattern(spec))
    x = torch.randn(shape)
    with torch.no_grad():
        y = layer(x)
        assert y.shape == linear(x).shape
        assert_is_right(layer, x, y)


def test_without_a_mask_the_zeros_are_the_mask() -> None:
    conv, mask = pruned_conv("unstructured")
    layer = SparseConv2d.from_dense(conv)
    assert layer.values.numel() == int(mask.sum())
    assert layer.density == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("spec", SPECS)
def test_to_dense_gives_the_layer_back_to_the_last_bit(spec: str) -> None:
    conv, mask = pruned_conv(spec, stride=2, dilation=2)
    conv.weight.requires_grad_(False)
    dense = SparseConv2d.from_dense(conv.eval(), mask, parse_pattern(spec)).to_dense()
    assert ConvGeometry.from_module(dense) == ConvGeometry.from_module(conv)
    assert torch.equal(dense.weight, conv.weight)
    assert torch.equal(dense.bias, conv.bias)
    assert (dense.training, dense.weight.requires_grad, dense.bias.requires_grad) == (False, False, True)
    assert dense.bias.data_ptr() != conv.bias.data_ptr()


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_layout_travel_in_the_state_dict(spec: str) -> None:
    layer, x = sparse_conv(spec), torch.randn(2, 24, 6, 6)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        expected = layer(x)
        other.values.zero_()
        other.bias.zero_()
        assert not torch.equal(other(x), expected)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), expected)
    assert {"values", "bias"} < set(layer.state_dict())
    assert len(layer.state_dict()) == 2 + len(layer.layout)
    assert layout_names(layer) == layer.state_dict().keys() - {"values", "bias"}
    assert layout_names(nn.Sequential(layer)) == {f"0.{name}" for name in layout_names(layer)}


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_stands_alone(twin_of: Any) -> None:
    layer, x = sparse_conv("unstructured"), torch.randn(2, 24, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        twin = twin_of(layer)
        assert torch.equal(twin(x), expected)
        twin.values.zero_()
        assert bool((twin(x) == twin.bias.view(1, -1, 1, 1)).all())
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_can_change_its_dtype(spec: str, dtype: torch.dtype) -> None:
    layer = sparse_conv(spec)
    x = torch.randn(17, 24, 7, 7)
    with torch.no_grad():
        layer(x)
        layer.to(dtype)
        assert layer.values.dtype == layer.bias.dtype == dtype
        assert all(array.dtype == torch.int32 for array in layer.layout)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert_is_right(layer, x.to(dtype), y)


def test_what_is_prepared_notices_every_change_of_the_values() -> None:
    layer, x = sparse_conv("unstructured"), torch.randn(1, 24, 5, 5)
    kept = layer.values.detach().clone()

    def assert_is_fresh() -> None:
        assert_is_right(layer, x, layer(x))

    with torch.no_grad():
        assert_is_fresh()
        layer.values.mul_(2)
        assert_is_fresh()
        layer.load_state_dict(layer.state_dict() | {"values": kept})
        assert_is_fresh()
        # Memory that is freed may be given to the next values, at the same address and of the same version.
        for scale in range(1, 20):
            layer.values = nn.Parameter(kept * scale)
            assert_is_fresh()
            layer.to(torch.bfloat16).to(torch.float32)
            assert_is_fresh()


def test_training_changes_the_outputs_and_only_kept_weights() -> None:
    layer, x = sparse_conv("block:4x4"), torch.randn(3, 24, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    masked = layer.dense_weight() == 0
    for _ in range(3):
        with torch.no_grad():
            before = layer(x)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            after = layer(x)
        assert not torch.equal(after, before)
        assert float(after.square().mean()) < float(before.square().mean())
        assert_is_right(layer, x, after)
    assert bool((layer.dense_weight()[masked] == 0).all())


def test_training_a_sparse_layer_leaves_the_dense_one_alone() -> None:
    conv, mask = pruned_conv("unstructured")
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    layer = SparseConv2d.from_dense(conv, mask)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(3.0)
    assert torch.equal(conv.weight, weight)
    assert torch.equal(conv.bias, bias)


@pytest.mark.parametrize("name", ["x", "values", "bias"])
def test_each_input_alone_gets_its_gradient(name: str) -> None:
    layer, x = sparse_conv("unstructured"), torch.randn(2, 24, 5, 5)
    layer.requires_grad_(False)
    leaf = x if name == "x" else getattr(layer, name)
    leaf.requires_grad_()
    layer(x).square().sum().backward()
    dense = layer.to_dense()
    dense_x = x.detach().requires_grad_(name == "x")
    dense(dense_x).square().sum().backward()
    if name == "values":
        grad = dense.weight.grad[layer.dense_weight() != 0]
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-4)
    else:
        expected = dense_x.grad if name == "x" else dense.bias.grad
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_eight_threads_at_once_get_equal_results_for_different_shapes(spec: str) -> None:
    layer = sparse_conv(spec)
    # More shapes than are kept prepared, so that threads prepare and drop at the same time.
    inputs = [torch.randn(1 + i % 7, 24, 5 + i % 3, 6) for i in range(60)]
    residuals = [torch.randn(x.shape[0], 16, *x.shape[2:]) for x in inputs]

    @torch.no_grad()
    def run(x: Tensor, residual: Tensor) -> Tensor:
        return layer(x, residual)

    expected = [run(*pair) for pair in zip(inputs, residuals, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(run, inputs, residuals), expected))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[_cpu.Prepared]]:
    """Every prepared form that is made in a test, alive or not."""
    made: list[weakref.ref[_cpu.Prepared]] = []

    def make(*args: Any) -> _cpu.Prepared:
        one = make.original(*args)  # type: ignore[attr-defined]
        made.append(weakref.ref(one))
        return one

    make.original = _cpu.Prepared  # type: ignore[attr-defined]
    monkeypatch.setattr(_cpu, "Prepared", make)
    return made


def alive(prepared: list[weakref.ref[_cpu.Prepared]]) -> list[bool]:
    gc.collect()
    return [one() is not None for one in prepared]


@torch.no_grad()
def test_a_second_call_prepares_nothing_and_what_was_used_last_is_kept(
    prepared: list[weakref.ref[_cpu.Prepared]],
) -> None:
    layer, threads = sparse_conv("unstructured"), torch.get_num_threads()
    inputs = [torch.randn(batch, 24, 5, 5) for batch in range(1, 10)]
    for _ in range(3):
        layer(inputs[0])
        layer(inputs[0].contiguous(memory_format=torch.channels_last), torch.randn(1, 16, 5, 5))
    assert len(prepared) == 1
    for x in inputs[1:]:
        layer(inputs[0])
        layer(x)
    # Nine shapes for eight places: the first one was used all the time, the second is the one that went.
    assert alive(prepared) == [True, False] + 7 * [True]
    layer(inputs[0])
    assert len(prepared) == 9
    try:
        torch.set_num_threads(threads + 1)
        layer(inputs[0])
        assert len(prepared) == 10
    finally:
        torch.set_num_threads(threads)
    layer(inputs[0].bfloat16())
    assert len(prepared) == 11


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["", "scalar", "dense"])
def test_a_layout_that_is_loaded_and_does_not_fit_is_refused(kernel: str) -> None:
    layer, x = sparse_conv("unstructured"), torch.randn(1, 24, 5, 5)
    layer.kernel = kernel
    layer(x)
    layer.load_state_dict(layer.state_dict() | {"layout_1": layer.layout_1.roll(1)})
    with pytest.raises(ValueError, match="layout: expected"):
        layer(x)


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda layer: layer.to(torch.bfloat16), lambda layer: layer.half()])
def test_a_change_of_dtype_drops_what_is_prepared_at_once(
    prepared: list[weakref.ref[_cpu.Prepared]], change: Any
) -> None:
    layer, x = sparse_conv("unstructured"), torch.randn(2, 24, 5, 5)
    layer(x)
    values = weakref.ref(layer.values.untyped_storage())
    assert alive(prepared) == [True]
    change(layer)
    assert alive(prepared) == [False]
    assert values() is None
    layer(x.to(layer.values.dtype))
    assert alive(prepared) == [False, True]


@pytest.mark.parametrize("spec", ["unstructured", "channel"])
@torch.no_grad()
def test_a_layer_compiles_exports_and_traces_to_the_fused_op(spec: str) -> None:
    conv, mask = pruned_conv(spec)
    layer = SparseConv2d.from_dense(conv, mask, parse_pattern(spec), act="relu").eval()
    x, residual = torch.randn(2, 24, 6, 6), torch.randn(2, 16, 6, 6)
    expected = layer(x, residual)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, residual), expected)
    for strict in (False, True):
        exported = torch.export.export(layer, (x, residual), strict=strict)
        targets = [node.target for node in exported.graph.nodes]
        assert torch.ops.vpns.sparse_conv2d_fused.default in targets
        assert torch.equal(exported.module()(x, residual), expected)


def test_weights_that_are_not_finite_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        conv, mask = pruned_conv("unstructured")
        with torch.no_grad():
            conv.weight.view(-1)[int(mask.flatten().nonzero()[3])] = bad
        for given in (mask, None):
            with pytest.raises(
                ValueError, match=r"pack: expected weights finite in torch.float32, got NaN or"
            ):
                SparseConv2d.from_dense(conv, given)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"SparseConv2d: expected act in \('none', 'relu', 'relu6'\), got 'silu'"
    ):
        SparseConv2d.from_dense(nn.Conv2d(3, 3, 3), act="silu")


@torch.no_grad()
def test_wrong_input_is_a_clear_error() -> None:
    layer = sparse_conv("unstructured")
    for shape in ((1, 23, 6, 6), (24, 6), (1, 24, 6), ()):
        with pytest.raises(ValueError, match=r"sparse_conv2d_fused: expected x \[N, 24, H, W\], got"):
            layer(torch.randn(shape))
    with pytest.raises(ValueError, match="at least 3 pixels with padding, got 2"):
        sparse_conv("unstructured", padding=0)(torch.randn(1, 24, 2, 6))
    linear = SparseLinear.from_dense(nn.Linear(24, 10))
    for shape in ((5, 23), (23, 5), ()):
        with pytest.raises(ValueError, match=r"SparseLinear: expected x \[\.\.\., 24\], got"):
            linear(torch.randn(shape))
    for conv in (nn.Conv2d(3, 3, 2, padding="same"), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(NotImplementedError, match=r"expected (as much padding|padding_mode 'zeros')"):
            SparseConv2d.from_dense(conv)


@torch.no_grad()
@pytest.mark.parametrize(("padding", "dilation"), [("same", 1), ("same", (2, 1)), ("valid", 1)])
def test_padding_in_words_is_that_many_pixels(padding: str, dilation: Any) -> None:
    conv, x = nn.Conv2d(3, 4, (3, 5), padding=padding, dilation=dilation), torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(SparseConv2d.from_dense(conv)(x), conv(x))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("spec", ["unstructured", "block:4x4", "channel"])
def test_a_step_that_leaves_no_trace_is_noticed(kind: str, spec: str) -> None:
    """torch's fused steps raise no version; a look between backward and step must not hide them."""
    layer, x = sparse_conv(spec).train(), torch.randn(2, 24, 5, 5)
    step = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](
        layer.parameters(), lr=0.5, fused=True
    ).step
    for mode in (True, True, False):
        layer.train(mode)
        layer(x).square().mean().backward()
        with torch.no_grad():
            layer(x)
        step()
        with torch.no_grad():
            assert_is_right(layer, x, layer(x))


def test_a_named_kernel_is_used_or_refused() -> None:
    conv, mask = pruned_conv("unstructured")
    x = torch.randn(2, 24, 5, 5)
    with torch.no_grad():
        layer = SparseConv2d.from_dense(conv, mask, kernel="scalar")
        assert layer.kernel_for(x) == "scalar"
        torch.testing.assert_close(layer(x), conv(x))
        with pytest.raises(ValueError, match="no kernel named 'fast'"):
            SparseConv2d.from_dense(conv, mask, kernel="fast")(x)
        channels, mask = pruned_conv("channel")
        layer = SparseConv2d.from_dense(channels, mask, parse_pattern("channel"), kernel="scalar")
        assert layer.kernel_for(x) == "scalar"
        torch.testing.assert_close(layer(x), channels(x))
