"""What is special about masked_conv2d: gradients, torch's contracts, determinism, refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vpns_kernels import OPS, ConvGeometry, masked_conv2d, masked_linear, native, parse_pattern
from vpns_kernels.modules import MaskedConv2d, MaskedLinear
from vpns_kernels.ops.masked_conv2d import cpu, reference
from vpns_kernels.ops.masked_conv2d.cases import PATTERNS, build_args, fits
from vpns_kernels.testing import poisoned_memory

OP = OPS["masked_conv2d"]
# Those of a CPU; tests/gpu has the others.
BACKENDS = [name for name in OP.backends if name != "triton"]


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
    layer.backends = "reference"
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


# Channels are masked by another op.
CASES = [case for case in OP.cases() if "float64" not in case.name and "-channel-" not in case.name]
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
    # Summed in float32 whatever the inputs are.
    error = (grad_scores.double() - args["scores"].detach().double().sign() * truth).abs()
    assert grad_scores.dtype == args["scores"].dtype
    assert bool((error <= 1e-6 * (size + truth.abs()) + 1e-30).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_gradients_are_those_of_float64(case: Any) -> None:
    args = case.build()
    with poisoned_memory():
        found = gradients(args, "cpu")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_gradients_are_right(args, found)


# Channels are masked by another op.
FORWARD_KERNELS = [
    name for name in native.library().sparse_conv2d_kernels(emulated=True) if not name.startswith("channel")
]
SCORE_KERNELS = ("amx", "avx512_bf16", "avx512", "avx2")
SCORE_KERNELS += ("amx_emulated", "avx512_emulated", "avx512_bf16_emulated")


def inputs_of(args: dict[str, Any], grad: Tensor) -> tuple[Any, ...]:
    """The gradients' arguments, as a backend takes them."""
    g, names = args["geometry"], ("x", "weight", "mask", "scores")
    tensors = (args[name].detach() for name in names)
    return grad, *tensors, args["pattern"].spec, g.stride, g.padding, g.dilation, g.groups


@pytest.mark.parametrize("kernel", FORWARD_KERNELS)
def test_every_kernel_takes_what_is_packed_for_either_direction(kernel: str) -> None:
    family = kernel.partition("_")[0]
    spec = {"unstructured": "unstructured", "depthwise": "unstructured", "grouped": "block:4x4"}.get(
        family, "block:16x16"
    )
    # Kernels of narrow groups want all weights.
    density = 1.0 if family == "grouped" else 0.3
    shapes = {"depthwise": ("depthwise",), "grouped": ("groups_of_4",)}.get(
        family, ("3x3_stride_2", "primes")
    )
    takes_halves = any(word in kernel for word in ("bf16", "fp16", "amx"))
    for dtype in (torch.bfloat16,) if takes_halves else (torch.float32, torch.bfloat16):
        for shape in shapes:
            args = build_args(shape, spec, density, "channels_last", dtype, False)
            y = masked_conv2d(**args, backend="reference")
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
            g = args["geometry"]
            rest = (g.stride, g.padding, g.dilation, g.groups, kernel)
            tensors = (args["x"], args["weight"], args["mask"], args["scores"])
            tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
            with poisoned_memory():
                found = cpu.run(*tensors, None, spec, *rest)
                found_x = cpu.run_input_gradient(*inputs_of(args, grad), kernel)
            torch.testing.assert_close(found, y, rtol=tolerance, atol=tolerance)
            expected = reference.run_input_gradient(*inputs_of(args, grad))
            torch.testing.assert_close(found_x, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", SCORE_KERNELS)
@pytest.mark.parametrize("shape", ["3x3", "primes", "stem_7x7", "mixed_stride_and_padding", "groups_2"])
def test_every_instruction_set_gives_scores_their_gradients(shape: str, kernel: str) -> None:
    if not kernel.endswith("emulated") and not native.has_isa(kernel):
        pytest.skip(f"this CPU has no {kernel}")
    for spec in ("block:16x16", "block:32x32", "block:8x4", "unstructured"):
        for dtype in ROUNDOFF:
            if ("bf16" in kernel or "amx" in kernel) and dtype != torch.bfloat16:
                continue
            if not fits(shape, spec):
                continue
            args = build_args(shape, spec, 0.3, "channels_last", dtype, False)
            y = masked_conv2d(**args, backend="reference")
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
            with poisoned_memory():
                found = cpu.run_score_gradient(*inputs_of(args, grad), kernel)
            truth, size = (true_gradients(args, args["weight"], is_size)[1] for is_size in (False, True))
            error = (found.double() - args["scores"].double().sign() * truth).abs()
            assert bool((error <= 1e-6 * (size + truth.abs())).all())


def test_a_kernel_that_cannot_is_refused() -> None:
    args = build_args("3x3", "block:16x16", 0.3, "channels_last", torch.float32, False)
    grad = masked_conv2d(**args)
    with pytest.raises(ValueError, match="weight_gradient: expected a kernel for this type"):
        cpu.run_score_gradient(*inputs_of(args, grad), "avx512_bf16_emulated")
    wide = {name: args[name].double() for name in ("x", "weight", "scores")}
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this: it takes float32 or halves"):
        masked_conv2d(**(args | wide), backend="cpu")
    grouped = build_args("depthwise", "block:16x16", 0.3, "sliced", torch.float32, False)
    with pytest.raises(NotImplementedError, match=r"it takes blocks within a group, got 16 of 1 filters"):
        masked_conv2d(**grouped, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["unstructured", "block:16x16"])
def test_the_same_bits_each_time_and_for_any_thread_count(spec: str, dtype: torch.dtype) -> None:
    args = build_args("primes", spec, 0.3, "channels_last", dtype, False)
    before = torch.get_num_threads()

    def run() -> list[Tensor]:
        return [masked_conv2d(**args, backend="cpu").detach(), *gradients(args, "cpu")][:3]

    try:
        torch.set_num_threads(1)
        first = run()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(34):
                assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_weight_may_lie_with_its_channels_last_or_anyhow() -> None:
    for spec in PATTERNS:
        args = build_args("primes", spec, 0.3, "channels_last", torch.float32, False)
        expected = [masked_conv2d(**args, backend="cpu").detach(), *gradients(args, "cpu")]
        weight, scores = args["weight"], args["scores"].detach()
        last = torch.channels_last
        for change in (
            {"weight": weight.contiguous(memory_format=last)},
            {"weight": weight.transpose(0, 1).contiguous().transpose(0, 1)},
            {
                name: args[name].detach().contiguous(memory_format=last)
                for name in ("weight", "mask", "scores")
            },
        ):
            again = args | {"scores": scores} | change
            found = [masked_conv2d(**again, backend="cpu").detach(), *gradients(again, "cpu")]
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[2], expected[2])


def test_nothing_the_size_of_the_weight_is_made() -> None:
    code = (
        "import torch\n"
        "from vpns_kernels import ConvGeometry, masked_conv2d, parse_pattern\n"
        "def step(channels):\n"
        "    g = ConvGeometry(channels, channels, (3, 3), padding=(1, 1))\n"
        "    pattern = parse_pattern('block:32x32')\n"
        "    weight = torch.randn(g.weight_shape)\n"
        "    scores = torch.randn(pattern.units_shape(g.weight_shape), requires_grad=True)\n"
        "    mask = torch.rand(scores.shape) < 0.1\n"
        "    x = torch.randn(2, channels, 7, 7).contiguous(memory_format=torch.channels_last)\n"
        "    x.requires_grad_()\n"
        "    def figure(name):\n"
        "        return int(open('/proc/self/status').read().split(name + ':')[1].split()[0])\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    before = figure('VmRSS')\n"
        "    masked_conv2d(x, weight, mask, scores, g, pattern, backend='cpu').sum().backward()\n"
        "    return (figure('VmHWM') - before) * 1024 / (4 * weight.numel())\n"
        "step(64)\n"
        "print(step(512))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


@pytest.mark.parametrize("spec", ["unstructured", "block:16x16"])
def test_masked_layers_are_traced_whole(spec: str) -> None:
    torch.manual_seed(2)
    layers = [nn.Conv2d(16, 32, 3, 2, 1), nn.Flatten(), nn.Linear(32 * 4 * 4, 24)]
    for place, kind in ((0, MaskedConv2d), (2, MaskedLinear)):
        layers[place].weight.requires_grad_(False)
        layers[place] = kind.from_dense(layers[place], parse_pattern(spec))
        with torch.no_grad():
            layers[place].scores.normal_()
            layers[place].mask.copy_(torch.rand(layers[place].mask.shape) < 0.4)
    network, x = nn.Sequential(*layers), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found = []
    for run in (network, compiled):
        network.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == 5  # two biases, two scores
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(network, (x,)).module()
    assert torch.equal(exported(x), network(x))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["unstructured", "block:32x32"])
def test_scores_of_many_tiles_are_right_and_the_same_for_any_thread_count(
    spec: str, dtype: torch.dtype
) -> None:
    """Where threads take slices of their own, and where there are too many threads for that."""
    generator = torch.Generator().manual_seed(7)
    geometry, pattern = ConvGeometry(40, 48, (3, 3), padding=(1, 1)), parse_pattern(spec)
    units = pattern.units_shape(geometry.weight_shape)
    args = {
        "x": torch.randn(7, 40, 61, 59, generator=generator).to(dtype),
        "weight": torch.randn(geometry.weight_shape, generator=generator),
        "mask": torch.ones(units, dtype=torch.bool),
        "scores": torch.randn(units, generator=generator),
        "geometry": geometry,
        "pattern": pattern,
        "bias": None,
    }
    grad = torch.randn(7, 48, 61, 59, generator=torch.Generator().manual_seed(5)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            with poisoned_memory():
                found.append(cpu.run_score_gradient(*inputs_of(args, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    truth, size = (true_gradients(args, args["weight"], is_size)[1] for is_size in (False, True))
    error = (found[0].double() - args["scores"].double().sign() * truth).abs()
    assert bool((error <= 1e-6 * (size + truth.abs())).all())
