"""How fast is each pass of a pruned layer on a GPU, against cuDNN and torch's compiler?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_targets import AUTOTUNED, CUDNN
from vpns_kernels.formats import pack, pick
from vpns_kernels.measure.gpu import interleave_recorded
from vpns_kernels.measure.layer_bench import Variant, make_mask, make_weight
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import Sample, compare
from vpns_kernels.ops import OPS
from vpns_kernels.patterns import parse_pattern

PASSES = ("forward", "input_gradient", "weight_gradient")
# An output further from dense than this share of the largest is no rounding.
_TOLERANCE = 5e-2
Row = dict[str, Any]


def bench_gpu_layer(
    layer: Layer,
    batch: int,
    pattern: str,
    densities: Sequence[float],
    device: torch.device,
    rounds: int,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
    is_autotuned: bool = False,
) -> list[Row]:
    """A row for each density and pass; in a pass, densities and engines take turns.

    Args:
        is_autotuned: forward alone, with the compiler's best as an opponent too; it takes seconds to find.

    Raises:
        RuntimeError: a pass whose result is not that of the dense layer.
        NotImplementedError: the backend does not take the layer.
    """
    x, grad, weight = _tensors(layer, batch, device, dtype)
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {
        phase: {CUDNN: call} for phase, call in _dense_passes(layer, x, grad, weight).items()
    }
    if is_autotuned:
        calls = {"forward": calls["forward"] | {AUTOTUNED: _autotuned(layer, x, weight)}}
    densities_of = {}
    for density in densities:
        ours, real = _our_passes(layer, pattern, density, backend, x, grad, weight)
        densities_of[density] = real
        for phase in calls:
            calls[phase][_name(density)] = ours[phase]
    rows = []
    for phase, contenders in calls.items():
        samples = interleave_recorded(contenders, rounds, device)
        dense = {name: samples[name] for name in (CUDNN, AUTOTUNED) if name in samples}
        for density in densities:
            row = _describe(layer, batch, pattern, density, densities_of[density], dtype)
            row |= {"pass": phase, "kernel": backend}
            rows.append(row | _compare(samples[_name(density)], dense))
    return rows


def add_roofline(row: Row, ceilings: dict[str, float]) -> None:
    """The least possible ms of kept work and traffic, and the shares that were reached."""
    compute_ms = 1e-9 * row["kept_flops"] / ceilings["bfloat16_tflops"]
    traffic_ms = 1e-3 * row["least_mb"] / ceilings["copy_tb_per_s"]
    spent = row["ours"]["median_ms"]
    row["copy_frac"] = traffic_ms / spent
    row["roofline"] = {
        "floor_ms": max(compute_ms, traffic_ms),
        "bound_by": "compute" if compute_ms >= traffic_ms else "traffic",
        "share": max(compute_ms, traffic_ms) / spent,
    }


def _name(density: float) -> str:
    return f"density {density:g}"


def _tensors(
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


def _dense_passes(layer: Layer, x: Tensor, grad: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
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


def _autotuned(layer: Layer, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    g = layer.geometry

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)

    # Recordings are ours.
    compiled = torch.compile(convolve, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: compiled(x, weight)


def _our_passes(
    layer: Layer, pattern: str, density: float, backend: str, x: Tensor, grad: Tensor, weight: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """The passes of a packed layer, checked, and its real density."""
    g, kind = layer.geometry, parse_pattern(pattern)
    dense = make_weight(layer)
    mask = make_mask(layer, dense, Variant(kind, density, x.dtype)).view(g.weight_shape)
    packed = pack(weight, mask, kind, g, x.dtype)
    values, layout = packed.values.to(x.device), [array.to(x.device) for array in packed.layout]
    sizes = (g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
    op = OPS["sparse_conv2d"]
    module, asked = op.module(backend), (x, values, layout, None, *sizes)
    op.resolve_passes(backend, *asked)
    back = (grad, x, values, layout, *sizes)
    ours: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: module.run(*asked),
        "input_gradient": lambda: module.run_input_gradient(*back),
        "weight_gradient": lambda: module.run_weight_gradient(*back),
    }
    truth = _dense_passes(layer, x, grad, weight * mask.to(x.device))
    expected = {name: call() for name, call in truth.items()}
    expected["weight_gradient"] = pick(
        expected["weight_gradient"].contiguous().cpu(), packed.values, packed.layout, g
    )
    for phase, call in ours.items():
        found, wanted = call().float().cpu(), expected[phase].float().cpu()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= _TOLERANCE:
            raise RuntimeError(
                f"bench_gpu_layer: expected the {phase} of {layer.name}, got a relative error of {error}"
            )
    return ours, float(mask.float().mean())


def _describe(layer: Layer, batch: int, pattern: str, density: float, real: float, dtype: torch.dtype) -> Row:
    g = layer.geometry
    P, Q = g.output_size(layer.height, layer.width)
    moved = batch * (g.in_channels * layer.height * layer.width + g.out_channels * P * Q)
    flops = g.flops(batch, layer.height, layer.width)
    return {
        "layer": layer.name,
        "count": layer.count,
        "in_channels": g.in_channels,
        "out_channels": g.out_channels,
        "kernel_size": list(g.kernel_size),
        "stride": g.stride[0],
        "height": layer.height,
        "batch": batch,
        "pattern": pattern,
        "density": density,
        "weight_density": real,
        "dtype": str(dtype)[6:],
        "kept_flops": real * flops,
        "least_mb": (moved + real * math.prod(g.weight_shape)) * dtype.itemsize / 1e6,
    }


def _compare(ours: Sample, dense: dict[str, Sample]) -> Row:
    best = min(dense, key=lambda name: dense[name].median_ms)
    return {
        "ours": ours.to_dict(),
        "dense": {name: sample.to_dict() for name, sample in dense.items()},
        "ratios": {name: asdict(compare(sample, ours)) for name, sample in dense.items()},
        "best_dense": best,
    }
