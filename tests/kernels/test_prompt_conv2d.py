"""What is special about prompt_conv2d: the trainer's canvas, gradients, determinism, refusals."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpns.prompt import FramedPad, ReleasedPad
from vpns_kernels import OPS, ConvGeometry, PromptGeometry, prompt_conv2d
from vpns_kernels.ops.prompt_conv2d.cases import build_args

CASES = OPS["prompt_conv2d"].cases()
BACKENDS = tuple(OPS["prompt_conv2d"].backends)
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
