"""What is special about prompt_conv2d: the trainer's canvas, gradients, determinism, refusals."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode

from vpns.prompt import FramedPad, ReleasedPad
from vpns_kernels import OPS, ConvGeometry, PromptGeometry, native, prompt_conv2d, schemas
from vpns_kernels.ops.prompt_conv2d import MEAN, STD, cpu, reference
from vpns_kernels.ops.prompt_conv2d.canvas import compose, normalise, to_unit
from vpns_kernels.ops.prompt_conv2d.cases import build_args
from vpns_kernels.testing import conv_excess, poisoned_memory

CASES = OPS["prompt_conv2d"].cases()
# Triton's kernels have tests of their own, in tests/gpu.
BACKENDS = ("cpu", "reference")
KERNELS = native.library().prompt_conv2d_kernels(True)
RESNET = ConvGeometry(3, 8, (7, 7), (2, 2), (3, 3))


def learned(args: dict[str, Any]) -> list[Tensor]:
    return [args[n].requires_grad_() for n in ("prompt", "weight", "bias") if args[n] is not None]


def test_the_example_gives_what_it_says() -> None:
    (example,) = doctest.DocTestFinder().find(prompt_conv2d, "prompt_conv2d", globs=globals().copy())
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
    assert example.examples


@pytest.mark.parametrize("kind", [FramedPad, ReleasedPad])
def test_it_is_the_first_layer_behind_the_trainers_prompt(kind: type[FramedPad] | type[ReleasedPad]) -> None:
    prompt = kind(PromptGeometry(28, 5), frozen=False)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, prompt.image_size, prompt.image_size), generator=generator)
    with torch.no_grad():
        prompt.raw.copy_(torch.randn(prompt.raw.shape, generator=generator))
    weight = torch.randn(RESNET.weight_shape, generator=generator).requires_grad_()
    variant = "framed" if kind is FramedPad else "released"
    for prompted in (True, False):
        expected = F.conv2d(prompt(images / 255, prompted), weight, None, 2, 3)
        raw = prompt.raw if prompted else None
        found = prompt_conv2d(images.to(torch.uint8), raw, weight, RESNET, 5, variant)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        leaves = (prompt.raw, weight) if prompted else (weight,)
        grad = torch.randn(expected.shape, generator=generator)
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["framed", "released"])
def test_gradcheck_of_the_reference(variant: str) -> None:
    args = build_args("mobile", variant, torch.float64, torch.float64, "bias")
    # Away from the clamp's edges, where there is no derivative.
    args["prompt"] = args["prompt"] * 0.9 + 0.01
    args["image"] = args["image"][:1, :, :7, :5]
    ring = 2 if variant == "framed" else 0
    args["prompt"] = args["prompt"][:, : 7 + 2 * ring, : 5 + 2 * ring].contiguous()
    args["weight"], args["bias"] = args["weight"][:3], args["bias"][:3]
    args["geometry"] = ConvGeometry(3, 3, (3, 3), (2, 2), (1, 1))

    def op(prompt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return prompt_conv2d(
            **(args | {"prompt": prompt, "weight": weight, "bias": bias}), backend="reference"
        )

    assert torch.autograd.gradcheck(op, learned(args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["framed", "released"])
def test_torch_finds_the_op_in_order(variant: str, backend: str) -> None:
    args = build_args("mobile", variant, torch.uint8, torch.float32, "bias")
    learned(args)
    inputs = (args["image"], args["prompt"], args["weight"], args["bias"], args["frame"], variant)
    sizes = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], [2, 2], [1, 1], [1, 1], 1)
    op = torch.ops.vpns.prompt_conv2d.default
    torch.library.opcheck(op, (*inputs, *sizes, torch.float32, [backend] * 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_as_a_whole_graph_and_exports(backend: str) -> None:
    args = build_args("resnet", "framed", torch.uint8, torch.bfloat16)

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = torch.nn.Parameter(args.pop("prompt"))
            self.weight = torch.nn.Parameter(args.pop("weight"))

        def forward(self, image: Tensor) -> Tensor:
            return prompt_conv2d(image, self.prompt, self.weight, **args, backend=backend)

    image, module = args.pop("image"), First()
    leaves = list(module.parameters())
    expected = module(image)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(image)
    assert torch.equal(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        exported = torch.export.export(module, (image,), dynamic_shapes=({0: torch.export.Dim("N")},))
        assert torch.equal(exported.module()(image[:1]), module(image[:1]))


def test_a_second_derivative_is_refused() -> None:
    args = build_args("mobile", "framed", torch.uint8, torch.float32)
    learned(args)
    with pytest.raises(NotImplementedError, match="expected a first derivative"):
        torch.autograd.grad(prompt_conv2d(**args).sum(), args["prompt"], create_graph=True)


def test_only_what_is_wanted_is_computed_each_by_its_backend() -> None:
    args = build_args("mobile", "released", torch.uint8, torch.float32)
    y = prompt_conv2d(**args)
    sizes = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], [2, 2], [1, 1], [1, 1], 1)
    inputs = (y, args["image"], args["prompt"], args["weight"], args["frame"], "released", *sizes)
    for backends in ([BACKENDS[0]] * 3, ["reference", BACKENDS[0], "reference"]):
        for wanted in range(8):
            wants = [bool(wanted >> i & 1) for i in range(3)]
            found = torch.ops.vpns.prompt_conv2d_backward(*inputs, wants, backends)
            assert [tensor.numel() > 0 for tensor in found] == wants


def gradients(args: dict[str, Any], backend: str, kernel: str = "") -> list[Tensor]:
    """Of prompt, weight and bias (empty without one), of a random gradient of the result."""
    g = args["geometry"]
    settings = (args["frame"], args["variant"], MEAN, STD, g.stride, g.padding, g.dilation, g.groups)
    size = args["image"].shape[2:] if args["variant"] == "released" else args["prompt"].shape[1:]
    shape = (len(args["image"]), g.out_channels, *g.output_size(*size))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(args["dtype"])
    inputs = (grad.to(args["dtype"]), args["image"], args["prompt"], args["weight"], *settings)
    wants = (True, True, args["bias"] is not None)
    if backend == "reference":
        return list(reference.run_backward(*inputs, wants))
    return list(cpu.run_backward(*inputs, wants, kernel))


def assert_gradients_are_within_the_bound(args: dict[str, Any], found: list[Tensor]) -> None:
    """Against float64 by the size of the sums: |error| / Σ|terms| of a few units of float32's roundoff."""
    wide = args | {
        name: None if args[name] is None else args[name].double() for name in ("prompt", "weight", "bias")
    }
    if args["dtype"] == torch.bfloat16:
        # What is multiplied is rounded to bfloat16: the canvas and the weight, but no sum.
        wide["weight"] = args["weight"].bfloat16().double()
    truth, scale = (float64_gradients(args, wide, absolute) for absolute in (False, True))
    for ours, theirs, size in zip(found, truth, scale, strict=True):
        if ours.numel() > 0:
            assert bool(((ours.double() - theirs).abs() <= 2e-6 * size + 1e-30).all())


def float64_gradients(args: dict[str, Any], wide: dict[str, Any], absolute: bool) -> list[Tensor]:
    """Gradients of the layer in float64; absolute: with the sizes of all terms instead of the terms."""
    size = (lambda tensor: tensor.abs()) if absolute else (lambda tensor: tensor)
    g, frame, variant = args["geometry"], args["frame"], args["variant"]
    prompt = None if wide["prompt"] is None else wide["prompt"].detach().requires_grad_()
    canvas = normalise(compose(to_unit(args["image"], torch.float64), prompt, frame, variant), MEAN, STD)
    x = canvas.float().to(args["dtype"]).double().detach()
    shape = (len(x), g.out_channels, *g.output_size(*x.shape[2:]))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(args["dtype"]).double()
    weight = wide["weight"].detach()
    conv = (g.stride, g.padding, g.dilation, g.groups)
    of_canvas = conv2d_input(x.shape, size(weight), size(grad), *conv)
    of_weight = conv2d_weight(size(x), weight.shape, size(grad), *conv)
    of_prompt = torch.empty(0)
    if prompt is not None:
        (of_prompt,) = torch.autograd.grad(canvas, prompt, of_canvas)
    return [of_prompt, of_weight, size(grad).sum((0, 2, 3))]


FITTING = [
    c for c in CASES if "float64" not in c.name and "depthwise" not in c.name and "empty" not in c.name
]


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_native_gradients_are_those_of_float64(case: Any) -> None:
    args = case.build()
    if args["prompt"] is None:
        args["prompt"] = torch.zeros(3, *schemas.canvas_size(args["image"], args["frame"], args["variant"]))
        args["bias"] = torch.ones(args["geometry"].out_channels)
    with poisoned_memory():
        found = gradients(args, "cpu")
    assert_gradients_are_within_the_bound(args, found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["framed", "released"])
def test_every_kernel_computes_layer_and_gradients(variant: str, kernel: str) -> None:
    for layer, pixels in (("resnet", torch.uint8), ("mobile", torch.float32), ("dilated", torch.uint8)):
        dtype = torch.bfloat16 if "bf16" in kernel else torch.float32
        args = build_args(layer, variant, pixels, dtype, "bias")
        g = args["geometry"]
        sizes = (g.stride, g.padding, g.dilation, g.groups, dtype)
        inputs = (args["image"], args["prompt"], args["weight"], args["bias"], args["frame"], variant)
        y = cpu.run(*inputs, MEAN, STD, *sizes, kernel=kernel)
        canvas = compose(to_unit(args["image"], torch.float32), args["prompt"], args["frame"], variant)
        x = normalise(canvas, MEAN, STD).to(dtype)
        assert conv_excess(y, x, args["weight"].to(dtype), args["bias"], g) <= 1
        assert_gradients_are_within_the_bound(args, gradients(args, "cpu", kernel))


def test_a_kernel_that_cannot_run_says_so() -> None:
    args = build_args("mobile", "framed", torch.uint8, torch.float32)
    for kernel in ("avx512_bf16_emulated", "sse"):
        with pytest.raises(ValueError, match=f"expected a kernel that runs here .*'{kernel}'"):
            gradients(args, "cpu", kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["framed", "released"])
def test_the_same_bits_each_time_and_for_any_thread_count(variant: str, dtype: torch.dtype) -> None:
    args = build_args("resnet", variant, torch.uint8, dtype, "bias")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = [prompt_conv2d(**args, backend="cpu"), *gradients(args, "cpu")]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(34):
                again = [prompt_conv2d(**args, backend="cpu"), *gradients(args, "cpu")]
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variant", ["framed", "released"])
def test_an_image_does_not_depend_on_its_batch(variant: str) -> None:
    args = build_args("cifar", variant, torch.uint8, torch.float32)
    together = prompt_conv2d(**args, backend="cpu")
    for i in range(len(args["image"])):
        alone = prompt_conv2d(**(args | {"image": args["image"][i : i + 1]}), backend="cpu")
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_images_of_any_strides(pixels: torch.dtype) -> None:
    args = build_args("mobile", "framed", pixels, torch.float32)
    expected = prompt_conv2d(**args, backend="cpu")
    image = args["image"]
    large = torch.full((1, 30, 40, 5), 77).to(pixels)
    view = large[:, 3:22, 5:28, 1:4].permute(0, 3, 1, 2).copy_(image)
    for same in (view, image.contiguous(), image.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(prompt_conv2d(**(args | {"image": same}), backend="cpu"), expected)


def test_the_clamp_passes_gradients_at_its_edges_as_torchs_does() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).expand(1, 3, 3, 3).contiguous()
    # Sums below, at and above 0, and below, at and above 1.
    prompt = torch.tensor([[-0.5, -0.5, 0.0], [0.0, -1.0, 0.0], [0.5, 0.5, 0.5]]).expand(3, 3, 3).contiguous()
    geometry = ConvGeometry(3, 4, (1, 1))
    weight = torch.ones(geometry.weight_shape)
    found = {}
    for backend in BACKENDS:
        leaf = prompt.clone().requires_grad_()
        y = prompt_conv2d(image, leaf, weight, geometry, 1, "released", backend=backend)
        (found[backend],) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(found["cpu"] != 0, found["reference"] != 0)
    assert sorted(set((found["cpu"][0] != 0).flatten().tolist())) == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_canvas_of_the_batch_is_ever_in_memory(dtype: torch.dtype) -> None:
    args = build_args("resnet", "framed", torch.uint8, dtype)
    args["image"] = args["image"][:1].expand(64, -1, -1, -1)
    g, canvas = args["geometry"], 3 * 48 * 48
    sizes = (g.stride, g.padding, g.dilation, g.groups)
    inputs = (args["image"], args["prompt"], args["weight"])
    settings = (args["frame"], "framed", MEAN, STD, *sizes)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.shape != y_shape:
                largest.append(found.numel())
            return found

    y_shape = cpu.run(*inputs, None, *settings, dtype).shape
    grad = torch.ones(y_shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with Watch():
        cpu.run(*inputs, None, *settings, dtype)
        cpu.run_backward(grad, *inputs, *settings, (True, True, True))
    # One prompt at most, or a weight; never a batch of anything.
    assert max(largest) <= max(canvas, args["weight"].numel())


def test_huge_values_and_nan_reach_what_sees_them() -> None:
    args = build_args("mobile", "framed", torch.float32, torch.float32)
    args["image"][0, 1, 0, 0] = float("nan")
    args["prompt"][2, -1, -1] = float("nan")
    y, expected = (prompt_conv2d(**args, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(y.isnan(), expected.isnan())
    assert 0 < int(y.isnan().sum()) < y.numel()


IMAGE = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
GOOD: dict[str, Any] = {
    "image": IMAGE,
    "prompt": torch.zeros(3, 12, 12),
    "weight": torch.zeros(RESNET.weight_shape),
    "geometry": RESNET,
    "frame": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": IMAGE[0]}, r"expected image \[N, 3, h, w\], got \[3, 8, 8\]"),
        ({"image": IMAGE[:, :1]}, r"expected image \[N, 3, h, w\], got \[2, 1, 8, 8\]"),
        ({"image": IMAGE.int()}, "expected an image of uint8 or floats, got torch.int32"),
        ({"variant": "full"}, "expected variant in .*'released'.*, got 'full'"),
        ({"frame": -1}, r"expected 0 <= 2 \* frame < 6, got frame=-1"),
        ({"frame": 4, "variant": "released"}, r"expected 0 <= 2 \* frame < 8, got frame=4"),
        ({"frame": 3}, r"expected a floating prompt \[3, 14, 14\], got torch.float32 \[3, 12, 12\]"),
        ({"prompt": torch.zeros(3, 12, 12).int()}, r"expected a floating prompt .*, got torch.int32"),
        ({"weight": torch.zeros(8, 3, 5, 5)}, r"expected a floating weight \[8, 3, 7, 7\], got .*5, 5\]"),
        ({"geometry": ConvGeometry(4, 8, (7, 7))}, "expected in_channels 3, got 4"),
        ({"bias": torch.zeros(3)}, r"expected bias \[8\], got \[3\]"),
        ({"mean": (0.0, 0.0)}, r"expected mean of 3 numbers, got \[0.0, 0.0\]"),
        ({"std": (1.0, 0.0, 1.0)}, r"expected std above 0, got \[1.0, 0.0, 1.0\]"),
        ({"dtype": torch.int32}, "expected a floating dtype, got torch.int32"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_conv2d(**(GOOD | change))


def test_an_image_that_needs_a_gradient_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="expected an image without gradient"):
        prompt_conv2d(**(GOOD | {"image": torch.zeros(2, 3, 8, 8, requires_grad=True)}))
