"""How fast is each pass of a pruned layer on a GPU, against cuDNN and torch's compiler?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.gpu_passes import OUR_PASSES, dense_passes, make_tensors
from bench.gpu_targets import AUTOTUNED, CUDNN
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.measure.gpu import interleave_recorded
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import Sample, compare

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
    stage: str = "tune",
) -> list[Row]:
    """A row for each density and pass; in a pass, densities and engines take turns.

    Args:
        stage: "tune" for packed weights, "search" for a mask over dense ones and gradients of its scores.
        is_autotuned: forward alone, with the compiler's best as an opponent too; it takes seconds to find.

    Raises:
        RuntimeError: a pass whose result is not that of the dense layer.
        NotImplementedError: the backend does not take the layer.
    """
    x, grad, weight = make_tensors(layer, batch, device, dtype)
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {
        phase: {CUDNN: call} for phase, call in dense_passes(layer, x, grad, weight).items()
    }
    if is_autotuned:
        calls = {"forward": calls["forward"] | {AUTOTUNED: _autotuned(layer, x, weight)}}
    densities_of = {}
    for density in densities:
        ours, real = OUR_PASSES[stage](layer, pattern, density, backend, x, grad, weight)
        densities_of[density] = real
        for phase in calls:
            calls[phase][_name(density)] = ours[phase]
    rows = []
    for phase, contenders in calls.items():
        samples = interleave_recorded(contenders, rounds, device)
        dense = {name: samples[name] for name in (CUDNN, AUTOTUNED) if name in samples}
        for density in densities:
            # Scores of masked units get their gradients too.
            share = 1.0 if (stage, phase) == ("search", "weight_gradient") else densities_of[density]
            row = _describe(layer, batch, pattern, density, share, dtype)
            row |= {"stage": stage, "pass": phase, "kernel": backend, "unit_density": densities_of[density]}
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


def _autotuned(layer: Layer, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    g = layer.geometry

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)

    # Of one function torch compiles so many variants and no more: the last layers' would not be compiled.
    torch._dynamo.reset()
    # Recordings are ours.
    compiled = torch.compile(convolve, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: compiled(x, weight)


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
        "dtype": dtype_name(dtype),
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
