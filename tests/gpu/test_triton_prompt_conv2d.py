"""Triton's prompt_conv2d: gradients against float64, strides of images, tile edges, splits, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode

from vpns_kernels import ConvGeometry, prompt_conv2d, schemas
from vpns_kernels.ops._triton import prompt_gradient, prompt_weight_gradient
from vpns_kernels.ops._triton.backend import is_interpreted
from vpns_kernels.ops._triton.launch import Launch, recorded
from vpns_kernels.ops.prompt_conv2d import MEAN, STD, reference, triton
from vpns_kernels.ops.prompt_conv2d.canvas import compose, normalise, to_unit
from vpns_kernels.ops.prompt_conv2d.cases import build_args
from vpns_kernels.testing import poisoned_memory

VARIANTS = ("framed", "released")
DTYPES = (torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available())
LAYERS = ("5x5", "no_frame", "dilated", "one_pixel", "patches")
# The interpreter takes seconds for these, and one type is enough for its arithmetic.
LARGE = () if is_interpreted() else ("mobile", "resnet", "frame_16")
ROWS = [
    (layer, variant, dtype)
    for layer in (*LAYERS, *LARGE)
    for variant in VARIANTS
    for dtype in DTYPES
    if not is_interpreted() or dtype == torch.float32 or layer == "dilated"
]


def build(layer: str, variant: str, pixels: torch.dtype, dtype: torch.dtype, **change: Any) -> dict[str, Any]:
    """The arguments of a case with few images, whose prompt, weight and bias learn."""
    args = build_args(layer, variant, pixels, dtype, "bias") | change
    return cropped(args, 9 if is_interpreted() else 64)


def cropped(args: dict[str, Any], most: int) -> dict[str, Any]:
    """Two images, of at most so many pixels each way."""
    image = args["image"][:2, :, :most, :most].contiguous()
    frame = args["frame"] if args["variant"] == "framed" else min(args["frame"], (most - 1) // 2)
    H, W = schemas.canvas_size(image, frame, args["variant"])
    prompt = None if args["prompt"] is None else args["prompt"][:, :H, :W].contiguous()
    return args | {"image": image, "frame": frame, "prompt": prompt}


def small(variant: str, pixels: torch.dtype) -> dict[str, Any]:
    """Two images of 6 × 6 pixels and a filter of 3 × 3."""
    args = build_args("mobile", variant, pixels, torch.float32, "bias")
    return cropped(args | {"image": args["image"].expand(2, -1, -1, -1)}, 6)


def on(device: torch.device, args: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in args.items()}


def gradient_of(args: dict[str, Any]) -> Tensor:
    """A random gradient of the result, of its type, channels_last."""
    g = args["geometry"]
    size = schemas.canvas_size(args["image"], args["frame"], args["variant"])
    shape = (len(args["image"]), g.out_channels, *g.output_size(*size))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(args["dtype"])
    return grad.contiguous(memory_format=torch.channels_last)


def settings_of(args: dict[str, Any]) -> tuple[Any, ...]:
    """What stands between the tensors and the wishes in the backward's schema."""
    g = args["geometry"]
    return (args["frame"], args["variant"], MEAN, STD, g.stride, g.padding, g.dilation, g.groups)


def gradients(args: dict[str, Any], device: torch.device, wants: tuple[bool, ...]) -> list[Tensor]:
    """Of prompt, weight and bias, by Triton, on the CPU."""
    moved = on(device, args)
    inputs = (gradient_of(args).to(device), moved["image"], moved["prompt"], moved["weight"])
    return [found.cpu() for found in triton.run_backward(*inputs, *settings_of(args), wants)]


def true_gradients(args: dict[str, Any], is_absolute: bool) -> list[Tensor]:
    """In float64 of the canvas and weight as they are rounded; absolute: sums of the terms' sizes."""
    size = torch.abs if is_absolute else torch.clone
    g, kind = args["geometry"], args["dtype"]
    prompt = None if args["prompt"] is None else args["prompt"].double().requires_grad_()
    canvas = compose(to_unit(args["image"], torch.float64), prompt, args["frame"], args["variant"])
    narrow = None if args["prompt"] is None else args["prompt"]
    seen = compose(to_unit(args["image"], torch.float32), narrow, args["frame"], args["variant"])
    x = normalise(seen, MEAN, STD).to(kind).double()
    weight, grad = args["weight"].to(kind).double(), gradient_of(args).double()
    conv = (g.stride, g.padding, g.dilation, g.groups)
    of_weight = conv2d_weight(size(x), weight.shape, size(grad), *conv)
    of_prompt = torch.empty(0)
    if prompt is not None:
        of_canvas = conv2d_input(x.shape, size(weight), size(grad), *conv)
        (of_prompt,) = torch.autograd.grad(normalise(canvas, MEAN, STD), prompt, of_canvas)
    return [of_prompt, of_weight, size(grad).sum((0, 2, 3))]


def assert_within_the_bound(args: dict[str, Any], found: list[Tensor]) -> None:
    """|error| / Σ|terms| of a few units of float32's roundoff."""
    for ours, truth, size in zip(found, true_gradients(args, False), true_gradients(args, True), strict=True):
        assert ours.shape == truth.shape
        assert bool(((ours.double() - truth).abs() <= 2e-6 * size + 1e-30).all())


@pytest.mark.parametrize(("layer", "variant", "dtype"), ROWS)
def test_gradients_are_those_of_float64(
    layer: str, variant: str, dtype: torch.dtype, device: torch.device
) -> None:
    # Layers see bytes and floats in turn.
    pixels = torch.uint8 if (*LAYERS, *LARGE).index(layer) % 2 else torch.float32
    args = build(layer, variant, pixels, dtype)
    with poisoned_memory():
        found = gradients(args, device, (True, True, True))
    assert_within_the_bound(args, found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_prompt_the_frame_is_black_and_weights_learn_from_it(
    variant: str, device: torch.device
) -> None:
    args = small(variant, torch.uint8) | {"prompt": None}
    assert_within_the_bound(args, gradients(args, device, (True, True, True)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_splits_gives_the_sums_of_all_images(
    variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = small(variant, torch.uint8)
    args["image"] = torch.cat([args["image"]] * 3)[:5]
    monkeypatch.setattr(prompt_gradient, "_IMAGES_PER_SPLIT", 2)
    monkeypatch.setattr(prompt_weight_gradient, "_STEPS_PER_SPLIT", 1)
    with poisoned_memory():
        first = gradients(args, device, (True, True, True))
        again = gradients(args, device, (True, True, True))
    assert_within_the_bound(args, first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_images_gradients_are_zero(variant: str, device: torch.device) -> None:
    args = build("empty", variant, torch.uint8, torch.float32)
    with poisoned_memory():
        found = gradients(args, device, (True, True, True))
    assert [tuple(tensor.shape) for tensor in found] == [
        tuple(args[name].shape) for name in ("prompt", "weight", "bias")
    ]
    assert not any(bool(tensor.any()) for tensor in found)


def test_only_what_is_wanted_is_computed(device: torch.device) -> None:
    args = build("one_pixel", "framed", torch.uint8, torch.float32)
    for wanted in range(8):
        wants = tuple(bool(wanted >> i & 1) for i in range(3))
        assert tuple(found.numel() > 0 for found in gradients(args, device, wants)) == wants


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_any_strides_give_the_same_bits(
    variant: str, pixels: torch.dtype, device: torch.device
) -> None:
    args = on(device, small(variant, pixels))
    image, grad = args["image"], gradient_of(args).to(device)
    rest = (args["prompt"], args["weight"], *settings_of(args), (True, True, False))
    expected = [prompt_conv2d(**args, backend="triton"), *triton.run_backward(grad, image, *rest)]
    large = torch.full((2, 10, 40, 5), 77, device=device).to(pixels)
    view = large[:, 3:9, 5:11, 1:4].permute(0, 3, 1, 2).copy_(image)
    for same in (view, image.contiguous(), image.transpose(2, 3).contiguous().transpose(2, 3)):
        found = [prompt_conv2d(**(args | {"image": same}), backend="triton")]
        found += triton.run_backward(grad, same, *rest)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (2, 65), (9, 14), (16, 8)], ids=str)
def test_outputs_that_fill_no_tile_or_just_one(size: tuple[int, int], device: torch.device) -> None:
    geometry = ConvGeometry(3, 65, (2, 3), padding=(0, 1))
    generator = torch.Generator().manual_seed(0)
    args = {
        "image": torch.rand(1, 3, size[0] + 1, size[1], generator=generator).to(device),
        "prompt": None,
        "weight": torch.randn(geometry.weight_shape, generator=generator).to(device),
        "geometry": geometry,
        "frame": 0,
    }
    with poisoned_memory():
        y = prompt_conv2d(**args, backend="triton")
    assert y.shape == (1, 65, *size)
    x = normalise(args["image"].double().cpu(), MEAN, STD)
    expected = F.conv2d(x, args["weight"].double().cpu(), None, padding=(0, 1))
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_the_clamp_passes_gradients_at_its_edges_as_torchs_does(device: torch.device) -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).expand(1, 3, 3, 3).contiguous()
    # Sums below, at and above 0, and below, at and above 1.
    prompt = torch.tensor([[-0.5, -0.5, 0.0], [0.0, -1.0, 0.0], [0.5, 0.5, 0.5]]).expand(3, 3, 3)
    geometry = ConvGeometry(3, 4, (1, 1))
    settings = (1, "released", MEAN, STD, *[(1, 1), (0, 0), (1, 1), 1], (True, False, False))
    inputs = (torch.ones(1, 4, 3, 3), image, prompt.contiguous(), torch.ones(geometry.weight_shape))
    expected, _, _ = reference.run_backward(*inputs, *settings)
    found, _, _ = triton.run_backward(*(tensor.to(device) for tensor in inputs), *settings)
    torch.testing.assert_close(found.cpu(), expected)
    assert set((expected[0] != 0).flatten().tolist()) == {False, True}


# The interpreter computes with NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_reaches_what_sees_it(device: torch.device) -> None:
    for variant in VARIANTS:
        args = small(variant, torch.float32)
        args["image"][0, 1, 0, 0] = args["prompt"][2, -1, -1] = float("nan")
        y = prompt_conv2d(**on(device, args), backend="triton").cpu()
        assert torch.equal(y.isnan(), prompt_conv2d(**args, backend="reference").isnan())
        assert 0 < int(y.isnan().sum()) < y.numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_canvas_of_the_batch_is_ever_in_memory(variant: str) -> None:
    args = build("5x5", variant, torch.uint8, torch.float32)
    args["image"] = args["image"][:1].expand(1000, -1, -1, -1)
    inputs, largest = (args["image"], args["prompt"], args["weight"]), []
    grad = gradient_of(args)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in known:
                largest.append(found.numel())
            return found

    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, grad)}
    launches: list[Launch] = []
    with recorded(launches.append), Watch():
        triton.run_backward(grad, *inputs, *settings_of(args), (True, True, True))
    assert "prompt_conv2d_wgrad" in {launch.kernel.__name__ for launch in launches}
    # A canvas for each of a few groups of images, sums of a few splits: never something of each image.
    sums = prompt_weight_gradient.pick_tiles(args["geometry"], grad.numel() // 17, grad.dtype).splits + 8
    assert max(largest) <= max(sums * args["weight"].numel(), 32 * 3 * 13 * 13)
    assert max(largest) < 1000 * 3 * 13 * 13


def test_what_it_does_not_take_says_so(device: torch.device) -> None:
    args = on(device, build("depthwise", "framed", torch.uint8, torch.float32))
    with pytest.raises(NotImplementedError, match="'triton' cannot run this: it takes one group, got 3"):
        prompt_conv2d(**args, backend="triton")
    wide = on(device, build("one_pixel", "framed", torch.uint8, torch.float64))
    with pytest.raises(NotImplementedError, match="without float64 anywhere"):
        prompt_conv2d(**wide, backend="triton")


def test_torch_finds_the_op_in_order(device: torch.device) -> None:
    args = on(device, build("one_pixel", "framed", torch.uint8, torch.float32))
    leaves = [args[name].requires_grad_() for name in ("prompt", "weight", "bias")]
    sizes = (args["frame"], "framed", list(MEAN), list(STD), [1, 1], [0, 0], [1, 1], 1, torch.float32)
    inputs = (args["image"], *leaves, *sizes, ["triton"] * 3)
    torch.library.opcheck(torch.ops.vpns.prompt_conv2d.default, inputs)
