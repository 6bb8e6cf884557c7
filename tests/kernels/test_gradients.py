"""Gradients of packed convolutions are those of float64, and the same bits each time."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from vpns_kernels import ConvGeometry, Packed, native, pack, parse_pattern, sparse_conv2d, unpack
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.ops import _cpu
from vpns_kernels.patterns import Channel
from vpns_kernels.sparse_modules import SparseConv2d
from vpns_kernels.testing import poisoned_memory

PATTERNS = ("unstructured", "block:16x16", "block:32x32", "block:8x4", "channel")
_PAIRS = list(
    itertools.product(
        ((1, 1), (3, 3), (2, 3), (7, 7)),
        ((1, 1), (2, 2), (3, 2), (2, 1)),
        ((0, 0), (1, 1), (2, 3)),
        ((1, 1), (2, 2), (1, 3)),
    )
)
GEOMETRIES = [ConvGeometry(37, 29, *sizes) for sizes in random.Random(0).sample(_PAIRS, 30)]
GEOMETRIES += [ConvGeometry(32, 64, (3, 3), (2, 2), (1, 1), groups=2), ConvGeometry(96, 33, (1, 1), (2, 2))]
ROUNDOFF = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-14}


def make(geometry: ConvGeometry, spec: str, dtype: torch.dtype, density: float = 0.3) -> Packed:
    pattern, generator = parse_pattern(spec), torch.Generator().manual_seed(1)
    weight = torch.randn(geometry.weight_shape, generator=generator).to(dtype)
    if isinstance(pattern, Channel):
        kept = [torch.rand(size, generator=generator) < 0.6 for size in weight.shape[:2]]
        mask = (kept[0][:, None] & kept[1])[..., None, None].expand_as(weight).contiguous()
    else:
        units = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < density
        mask = pattern.expand(units, geometry.weight_shape).contiguous()
    return pack(weight, mask, pattern, geometry)


def inputs(
    geometry: ConvGeometry, images: int, dtype: torch.dtype, at_least: int = 13
) -> tuple[Tensor, Tensor]:
    """An input that the filter fits into, and a gradient of the output."""
    reach = [(k - 1) * d + 2 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    size = [max(at_least, pixels) for pixels in reach]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(images, geometry.in_channels, *size, generator=generator).to(dtype)
    grad_shape = (images, geometry.out_channels, *geometry.output_size(*size))
    return x, torch.randn(grad_shape, generator=generator).to(dtype)


def gradients(
    packed: Packed, x: Tensor, grad: Tensor, backend: str | tuple[str, str, str]
) -> tuple[Tensor, Tensor]:
    x, values = x.detach().requires_grad_(), packed.values.detach().requires_grad_()
    y = sparse_conv2d(x, values, packed.layout, packed.geometry, backend=backend)
    grad_x, grad_values = torch.autograd.grad(y, (x, values), grad)
    return grad_x, grad_values


def native_where_it_can(packed: Packed, dtype: torch.dtype) -> tuple[str, str, str]:
    """The passes' backends: channels in double precision and their weight gradients are torch's."""
    is_channel, is_double = isinstance(packed.pattern, Channel), dtype == torch.float64
    convolution = "compact" if is_channel and is_double else "cpu"
    if is_channel:
        return convolution, convolution, "compact"
    return convolution, convolution, "reference" if is_double or not native.has_isa("avx2") else "cpu"


def native_weight_gradient(packed: Packed, x: Tensor, grad: Tensor, kernel: str, threads: int) -> Tensor:
    """By the kernel of that name."""
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    library, g, (N, C, H, W), (_, K, P, Q) = native.library(), packed.geometry, x.shape, grad.shape
    indptr, index = (array.data_ptr() for array in packed.layout[:2])
    values = packed.values.float()
    weights = library.Weights(values.data_ptr(), "float32", indptr, index, list(values.shape))
    sizes = [N, C, H, W, K, *g.kernel_size, P, Q, *g.stride, *g.padding, *g.dilation, g.groups]
    handle = library.sparse_conv2d_prepare_weight_gradient(sizes, weights, kernel)
    found = torch.empty(values.shape)
    dtype = dtype_name(x.dtype)
    handle.run(x.data_ptr(), dtype, H * W * C, W * C, C, grad.data_ptr(), found.data_ptr(), threads)
    return found


def assert_within_the_bound(
    packed: Packed,
    x: Tensor,
    grad: Tensor,
    found: tuple[Tensor | None, Tensor | None],
    sums: torch.dtype | None = None,
) -> None:
    """Against float64, by the size of the sums: |error| / Σ|terms| of a few units of roundoff.

    Args:
        sums: the dtype of the roundoff; that of x by default.
    """
    g = packed.geometry
    wide = Packed(packed.values.double(), packed.layout, packed.pattern, g)
    truth = gradients(wide, x.double(), grad.double(), "reference")
    scale_of = Packed(wide.values.abs(), packed.layout, packed.pattern, g)
    scale = gradients(scale_of, x.double().abs(), grad.double().abs(), "reference")
    limit = ROUNDOFF[sums or x.dtype]
    for ours, theirs, size in zip(found, truth, scale, strict=True):
        if ours is None:
            continue
        error = (ours.double() - theirs).abs()
        # Both the sums' own rounding and the one rounding of the result.
        assert bool((error <= limit * (size + theirs.abs()) + 1e-30).all())


def runnable(geometry: ConvGeometry, spec: str) -> bool:
    return geometry.groups == 1 or spec != "channel"


@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_native_gradients_are_those_of_float64(geometry: ConvGeometry, spec: str) -> None:
    if not runnable(geometry, spec):
        with pytest.raises(NotImplementedError, match="expected"):
            make(geometry, spec, torch.float32)
        return
    for images, dtype in ((3, torch.float32), (17, torch.bfloat16), (1, torch.float64), (2, torch.float16)):
        packed, (x, grad) = make(geometry, spec, dtype), inputs(geometry, images, dtype)
        with poisoned_memory():
            found = gradients(packed, x, grad, native_where_it_can(packed, dtype))
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert_within_the_bound(packed, x, grad, found)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "block:8x4"])
def test_weights_that_see_padding_alone_have_no_gradient(
    spec: str, stride: int, size: tuple[int, int]
) -> None:
    geometry = ConvGeometry(37, 29, (3, 3), (stride, stride), (2, 1), (2, 1))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 37, *size, generator=generator)
    grad = torch.randn(6, 29, *geometry.output_size(*size), generator=generator)
    packed = make(geometry, spec, torch.float32)
    with poisoned_memory():
        found = gradients(packed, x, grad, native_where_it_can(packed, x.dtype))
    assert_within_the_bound(packed, x, grad, found)
    dense = unpack(found[1], packed.layout, geometry)
    # Of an image of one row, the first and the last row of the filter.
    if size[0] == 1:
        assert not dense[:, :, ::2].any()
        assert dense[:, :, 1].any()


@pytest.mark.parametrize("spec", ["unstructured", "block:4x2", "channel"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:30:3], ids=str)
def test_gradcheck_in_double_precision(geometry: ConvGeometry, spec: str) -> None:
    g = ConvGeometry(5, 4, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    packed = make(g, spec, torch.float64, 0.4)
    x, _ = inputs(g, 1, torch.float64)
    x = x[..., : max(4, (g.kernel_size[1] - 1) * g.dilation[1] + 1)]
    backend = native_where_it_can(packed, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, values: sparse_conv2d(x, values, packed.layout, g, backend=backend),
        (x.requires_grad_(), packed.values.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("isa", native.library().isa_list())
def test_every_instruction_set_computes_them(spec: str, isa: str) -> None:
    geometry = ConvGeometry(48, 40, (3, 3), (2, 1), (1, 1))
    packed, (x, grad) = make(geometry, spec, torch.float32), inputs(geometry, 18, torch.float32)
    native.library().isa_cap(isa)
    try:
        assert_within_the_bound(
            packed, x, grad, gradients(packed, x, grad, native_where_it_can(packed, x.dtype))
        )
    finally:
        native.library().isa_cap("")


@pytest.mark.parametrize("kernel", native.library().unstructured_gradient_kernels(emulated=True))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_unstructured_weight_gradients_by_every_kernel(geometry: ConvGeometry, kernel: str) -> None:
    for images, density, dtype in (
        (1, 1.0, torch.float32),
        (2, 0.0, torch.float32),
        (35, 0.02, torch.float32),
        (5, 0.3, torch.bfloat16),
        (16, 0.3, torch.float16),
    ):
        packed = make(geometry, "unstructured", dtype, density)
        x, grad = inputs(geometry, images, dtype)
        found = []
        for threads in (1, 2, 3, 7):
            with poisoned_memory():
                found.append(native_weight_gradient(packed, x, grad, kernel, threads))
        assert all(torch.equal(found[0], again) for again in found[1:])
        # The sums are float32, so the bound is that of float32 whatever the inputs.
        assert_within_the_bound(packed, x, grad, (None, found[0]), torch.float32)


@pytest.mark.parametrize("spec", ["block:16x16", "block:32x32", "block:8x4"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_block_weight_gradients_on_emulated_tiles(geometry: ConvGeometry, spec: str) -> None:
    # Lines along rows of outputs, and over images where rows are short: whole ones, and a last one cut.
    for images, density, size in ((1, 1.0, 13), (2, 0.0, 13), (35, 0.1, 5), (67, 0.1, 9), (3, 0.3, 37)):
        packed = make(geometry, spec, torch.bfloat16, density)
        x, grad = inputs(geometry, images, torch.bfloat16, size)
        found = []
        for threads in (1, 3):
            with poisoned_memory():
                found.append(native_weight_gradient(packed, x, grad, "amx_emulated", threads))
        assert torch.equal(*found)
        assert_within_the_bound(packed, x, grad, (None, found[0]), torch.float32)


@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_layer_that_learned_computes_with_what_it_learned(spec: str, is_fused: bool) -> None:
    packed = make(ConvGeometry(32, 32, (3, 3)), spec, torch.float32)
    layer, x = SparseConv2d(packed), torch.randn(2, 32, 7, 7)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=is_fused)
    for _ in range(2):
        with torch.no_grad():
            layer(x)
        layer(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            learned = Packed(layer.values.detach().clone(), packed.layout, packed.pattern, packed.geometry)
            assert torch.equal(layer(x), SparseConv2d(learned)(x))


def test_a_layer_whose_mode_was_set_computes_with_what_it_has_now() -> None:
    packed, x = make(ConvGeometry(32, 32, (3, 3)), "block:16x16", torch.float32), torch.randn(2, 32, 7, 7)
    layer = SparseConv2d(packed)
    with torch.no_grad():
        before = layer(x)
        # As a compiled and fused step does: no version is counted, and no forward pass is seen.
        layer.values.data.mul_(2)
        assert torch.equal(layer.eval()(x), 2 * before)


@pytest.mark.parametrize("spec", PATTERNS)
def test_the_same_bits_each_time_and_for_any_thread_count(spec: str) -> None:
    geometry = ConvGeometry(64, 48, (3, 3), (1, 1), (1, 1))
    packed, (x, grad) = make(geometry, spec, torch.float32), inputs(geometry, 5, torch.float32)
    backends = native_where_it_can(packed, x.dtype)
    wants = [True, backends[2] == "cpu"]  # torch's own depend on the number of threads
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = gradients(packed, x, grad, backends)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(34):
                again = gradients(packed, x, grad, backends)
                assert all(torch.equal(a, b) for a, b, w in zip(first, again, wants, strict=True) if w)
    finally:
        torch.set_num_threads(before)


def test_only_what_is_wanted_is_computed() -> None:
    geometry = ConvGeometry(32, 32, (3, 3), padding=(1, 1))
    packed, (x, grad) = make(geometry, "block:16x16", torch.float32), inputs(geometry, 2, torch.float32)
    args: tuple[Any, ...] = (grad, x, packed.values, list(packed.layout), geometry.weight_shape)
    args += (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    backward = torch.ops.vpns.sparse_conv2d_backward
    assert [t.numel() > 0 for t in backward(*args, [True, False], ["cpu"] * 3)] == [True, False]
    assert [t.numel() > 0 for t in backward(*args, [False, True], ["cpu"] * 3)] == [False, True]


@pytest.mark.parametrize("spec", PATTERNS)
def test_a_nan_reaches_only_what_it_is_connected_with(spec: str) -> None:
    geometry = ConvGeometry(32, 32, (1, 1))
    packed, (x, grad) = make(geometry, spec, torch.float32), inputs(geometry, 2, torch.float32)
    grad[1, 3, 2, 2] = float("nan")
    grad_x, _ = gradients(packed, x, grad, ("cpu", "cpu", "auto"))
    assert not bool(grad_x[0].isnan().any())
    assert not bool(grad_x[1, :, 3:].isnan().any())
    kept = unpack(packed.values, packed.layout, geometry)[3, :, 0, 0] != 0
    assert bool(grad_x[1, kept, 2, 2].isnan().all())


def test_each_pass_runs_by_the_backend_given_for_it() -> None:
    geometry = ConvGeometry(32, 32, (3, 3), padding=(1, 1))
    packed, (x, grad) = make(geometry, "block:16x16", torch.float32), inputs(geometry, 2, torch.float32)
    by_cpu, by_torch = (gradients(packed, x, grad, name) for name in ("cpu", "reference"))
    mixed = gradients(packed, x, grad, ("reference", "cpu", "reference"))
    assert torch.equal(mixed[0], by_cpu[0])
    assert torch.equal(mixed[1], by_torch[1])
    assert not torch.equal(by_cpu[0], by_torch[0])


def test_a_backend_that_cannot_run_a_pass_is_refused_where_the_pass_is_wanted() -> None:
    packed, x = make(ConvGeometry(8, 8, (1, 1)), "channel", torch.float32), torch.randn(1, 8, 3, 3)
    values = packed.values.detach().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"backend 'cpu' cannot run this: it takes .*\['compact'"):
        sparse_conv2d(x, values, packed.layout, packed.geometry, backend=("auto", "auto", "cpu"))
    y = sparse_conv2d(x, values.detach(), packed.layout, packed.geometry, backend="cpu")
    assert not y.requires_grad
    for backends in (("cpu", "cpu"), ("auto", "auto", "fpga")):
        with pytest.raises(ValueError, match=r"expected (one backend, or three|backend in)"):
            sparse_conv2d(x, values.detach(), packed.layout, packed.geometry, backend=backends)


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_an_optimizer_changed_give_the_bits_of_a_fresh_layer(
    spec: str, dtype: torch.dtype
) -> None:
    geometry = ConvGeometry(48, 40, (3, 3), (2, 1), (1, 1))
    packed, (x, grad) = make(geometry, spec, torch.float32), inputs(geometry, 19, dtype)
    backends = native_where_it_can(packed, dtype)
    values = packed.values.requires_grad_()

    def step(values: Tensor, layout: tuple[Tensor, ...]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = sparse_conv2d(leaf, values, layout, geometry, backend=backends)
        return [y.detach(), *torch.autograd.grad(y, (leaf, values), grad)]

    for change in (lambda: values.add_(1), lambda: values.data.mul_(-2), lambda: None):
        with torch.no_grad():
            change()
        found = step(values, packed.layout)
        fresh = values.detach().clone().requires_grad_()
        expected = step(fresh, tuple(array.clone() for array in packed.layout))
        assert all(map(torch.equal, found, expected))
        assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]


def test_a_layout_is_planned_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, planned = ConvGeometry(32, 32, (3, 3), padding=(1, 1)), []
    packed, (x, grad) = make(geometry, "unstructured", torch.float32), inputs(geometry, 2, torch.float32)
    describe = _cpu.prepared.describe
    for module in (_cpu.prepared, _cpu.gradients):
        monkeypatch.setattr(module, "describe", lambda *args: planned.append(1) or describe(*args))
    for _ in range(3):
        gradients(packed, x, grad, "cpu")
        packed.values.mul_(2)
    assert len(planned) == 3  # one for each pass


def test_a_layout_changed_in_place_is_noticed_by_the_gradients() -> None:
    geometry = ConvGeometry(32, 32, (1, 1))
    packed, (x, grad) = make(geometry, "unstructured", torch.float32), inputs(geometry, 2, torch.float32)
    for backward in (_cpu.input_gradient, _cpu.weight_gradient):
        first = x.shape if backward is _cpu.input_gradient else x
        layout = [array.clone() for array in packed.layout]
        backward(grad, first, packed.values, layout, geometry)
        layout[1][3] = -1
        with pytest.raises(ValueError, match="layout: expected"):
            backward(grad, first, packed.values, layout, geometry)


def test_what_is_planned_goes_with_the_layout() -> None:
    geometry = ConvGeometry(32, 32, (1, 1))
    packed, (x, grad) = make(geometry, "unstructured", torch.float32), inputs(geometry, 2, torch.float32)
    gradients(packed, x, grad, "cpu")
    index = weakref.ref(packed.layout[0])
    del packed
    gc.collect()
    assert index() is None


def test_a_layer_under_autocast_computes_in_bfloat16_and_its_values_learn_in_float32() -> None:
    geometry = ConvGeometry(32, 32, (3, 3), padding=(1, 1))
    packed, (x, grad) = make(geometry, "block:16x16", torch.float32), inputs(geometry, 2, torch.float32)
    layer = SparseConv2d(packed, act="relu", backends=("cpu", "cpu", "reference"))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, grad)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32
    assert torch.equal(y, layer(x.bfloat16(), grad.bfloat16()))
