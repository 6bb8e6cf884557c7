"""The passes of a layer, dense, packed (tuning) and masked (search), each checked against dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vpns_kernels.formats import pack, pick
from vpns_kernels.measure.layer_bench import Variant, make_mask, make_weight
from vpns_kernels.measure.layers import Layer
from vpns_kernels.ops import OPS
from vpns_kernels.patterns import parse_pattern

PASSES = ("forward", "input_gradient", "weight_gradient")
# An output further from dense than this share of the largest is no rounding.
_TOLERANCE = 5e-2
Calls = dict[str, Callable[[], Tensor]]


def make_tensors(
    layer: Layer, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, the output's gradient and the weight, channels_last."""
    g = layer.geometry
    generator = torch.Generator(device).manual_seed(0)
    shapes = (
        (batch, g.in_channels, layer.height, layer.width),
        (batch, g.out_channels, *g.output_size(layer.height, layer.width)),
    )
    x, grad = (
        torch.randn(shape, device=device, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )
    weight = make_weight(layer).weight.detach().reshape(g.weight_shape).to(device, dtype)
    return x, grad, weight.contiguous(memory_format=torch.channels_last)


def dense_passes(layer: Layer, x: Tensor, grad: Tensor, weight: Tensor) -> Calls:
    """torch's, by cuDNN on a GPU."""
    g = layer.geometry
    sizes = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups)

    def backward(place: int) -> Tensor:
        wants = [place == number for number in range(3)]
        found: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, wants)[place]
        return found

    return {
        "forward": lambda: torch.ops.aten.convolution(x, weight, None, *sizes),
        "input_gradient": partial(backward, 0),
        "weight_gradient": partial(backward, 1),
    }


def packed_passes(
    layer: Layer, pattern: str, density: float, backend: str, x: Tensor, grad: Tensor, weight: Tensor
) -> tuple[Calls, float]:
    """Of packed weights, with gradients of the kept ones; and the real density."""
    g, kind = layer.geometry, parse_pattern(pattern)
    mask = _draw_mask(layer, pattern, density, x.dtype)
    packed = pack(weight, mask, kind, g, x.dtype)
    values, layout = packed.values.to(x.device), [array.to(x.device) for array in packed.layout]
    sizes = (g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
    op = OPS["sparse_conv2d"]
    module, asked = op.module(backend), (x, values, layout, None, *sizes)
    op.resolve_passes(backend, *asked)
    back = (grad, x, values, layout, *sizes)
    ours: Calls = {
        "forward": lambda: module.run(*asked),
        "input_gradient": lambda: module.run_input_gradient(*back),
        "weight_gradient": lambda: module.run_weight_gradient(*back),
    }
    expected = _truth(layer, x, grad, weight, mask)
    dense_gradient = expected["weight_gradient"].contiguous().cpu()
    expected["weight_gradient"] = pick(dense_gradient, packed.values, packed.layout, g).to(x.device)
    _check(layer, ours, expected)
    return ours, float(mask.float().mean())


def masked_passes(
    layer: Layer, pattern: str, density: float, backend: str, x: Tensor, grad: Tensor, weight: Tensor
) -> tuple[Calls, float]:
    """Of a dense weight under a mask, with the gradients of all units' scores; and the real density."""
    g, kind = layer.geometry, parse_pattern(pattern)
    mask = _draw_mask(layer, pattern, density, x.dtype)
    units = kind.reduce_sum(mask.float()) > 0
    scores = torch.ones(units.shape, device=x.device)
    wide = weight.float()
    sizes = (kind.spec, g.stride, g.padding, g.dilation, g.groups)
    op = OPS["masked_conv2d"]
    module, asked = op.module(backend), (x, wide, units.to(x.device), scores, None, *sizes)
    op.resolve_passes(backend, *asked)
    back = (grad, *asked[:4], *sizes)
    ours: Calls = {
        "forward": lambda: module.run(*asked),
        "input_gradient": lambda: module.run_input_gradient(*back),
        "weight_gradient": lambda: module.run_score_gradient(*back),
    }
    expected = _truth(layer, x, grad, weight, mask)
    expected["weight_gradient"] = kind.reduce_sum(wide * expected["weight_gradient"].float())
    _check(layer, ours, expected)
    return ours, float(mask.float().mean())


# By stage.
OUR_PASSES: Mapping[str, Callable[..., tuple[Calls, float]]] = {
    "tune": packed_passes,
    "search": masked_passes,
}


def _draw_mask(layer: Layer, pattern: str, density: float, dtype: torch.dtype) -> Tensor:
    variant = Variant(parse_pattern(pattern), density, dtype)
    return make_mask(layer, make_weight(layer), variant).view(layer.geometry.weight_shape)


def _truth(layer: Layer, x: Tensor, grad: Tensor, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    masked = dense_passes(layer, x, grad, weight * mask.to(x.device))
    return {name: call() for name, call in masked.items()}


def _check(layer: Layer, ours: Calls, expected: Mapping[str, Tensor]) -> None:
    errors = []
    for phase, call in ours.items():
        wanted = expected[phase].float()
        errors.append((call().float() - wanted).abs().max() / wanted.abs().max())
    # Compared where they are, and read once: they are gigabytes.
    for phase, error in zip(ours, torch.stack(errors).tolist(), strict=True):
        if not error <= _TOLERANCE:
            raise RuntimeError(
                f"bench_gpu_layer: expected the {phase} of {layer.name}, got a relative error of {error}"
            )
