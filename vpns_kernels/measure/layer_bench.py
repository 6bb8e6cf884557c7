"""How fast is one layer, sparse against dense? All of its variants in turn, in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.opponents import find_opponents, find_sparseprop
from vpns_kernels.measure.random_network import draw_units
from vpns_kernels.measure.subject import Call, without_grad
from vpns_kernels.measure.timing import Sample, compare, interleave
from vpns_kernels.ops import select_threshold
from vpns_kernels.ops._cpu import Prepared
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.runners import prepare
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

# An output further from dense than this share of the largest is no rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_COPY_FLOATS, _COPY_ROUNDS = 1 << 24, 6


@dataclass(frozen=True)
class Variant:
    """One sparse form of a layer.

    Args:
        kernel: as sparse layers take it: "sparse" for the best sparse kernel, "auto" for what a layer chooses
            by itself, or a name.
    """

    pattern: Pattern
    density: float
    dtype: torch.dtype
    seed: int = 0
    kernel: str = "sparse"


@torch.no_grad()
def bench_layer(
    layer: Layer, batch: int, variants: Sequence[Variant], opponents: Iterable[str], rounds: int
) -> list[dict[str, Any]]:
    """A row for each variant, all timed in turn with the dense engines.

    Raises:
        RuntimeError: an engine that is not there, or a variant whose outputs are not those of the layer.
    """
    x, dense = make_input(layer, batch), make_weight(layer)
    calls: dict[str, Call] = {}
    for name, opponent in find_opponents(dense, x, opponents).items():
        if opponent.call is None:
            raise RuntimeError(f"bench_layer: expected {name!r}, got: {opponent.why_not}")
        calls[name] = opponent.call
    engines = list(calls)
    masks = [make_mask(layer, dense, variant) for variant in variants]
    sparse = [make_sparse(dense, mask, variant) for mask, variant in zip(masks, variants, strict=True)]
    inputs = {variant.dtype: x.to(variant.dtype) for variant in variants}
    for number, (variant, mask) in enumerate(zip(variants, masks, strict=True)):
        calls[f"sparse {number}"] = without_grad(sparse[number], inputs[variant.dtype])
        _check(layer, dense, mask, inputs[variant.dtype], calls[f"sparse {number}"]())
    for number, (variant, mask) in enumerate(zip(variants, masks, strict=True)):
        if variant.pattern.name == "unstructured" and variant.dtype == torch.float32:
            given = x.contiguous()
            rival = find_sparseprop(_masked(layer, dense, mask), given)
            if rival is not None:
                calls[f"sparseprop {number}"] = without_grad(rival, given)
    samples = interleave(calls, rounds)
    timed = {name: samples[name] for name in engines}
    rows = []
    for number, (variant, mask, module) in enumerate(zip(variants, masks, sparse, strict=True)):
        given = inputs[variant.dtype]
        row = _row(layer, batch, variant, mask, module, given, samples[f"sparse {number}"], timed)
        rival_sample = samples.get(f"sparseprop {number}")
        row["sparseprop"] = None if rival_sample is None else rival_sample.to_dict()
        row["phases_ms"] = phases_ms(module, given, rounds)
        rows.append(row)
    return rows


def phases_ms(module: SparseConv2d | SparseLinear, x: Tensor, rounds: int) -> dict[str, float] | None:
    """Least times of layout, products and stores, averaged over threads; None if not counted."""
    image = x if x.dim() == 4 else x.reshape(*x.shape, 1, 1)
    runner = prepare(module.values, module.layout, module.geometry, image.shape, image.dtype, module.kernel)
    if not isinstance(runner, Prepared):
        return None
    best = torch.full((3,), math.inf, dtype=torch.float64)
    for _ in range(rounds):
        taken = torch.zeros(3, dtype=torch.float64)
        runner.run(image, None, phases=taken)
        best = torch.minimum(best, taken)
    if not float(best.sum()):
        return None
    return dict(zip(("layout", "products", "stores"), (1000 * best).tolist(), strict=True))


def bench_selection(layers: Sequence[Layer], density: float, rounds: int) -> dict[str, Any]:
    """select_threshold over a network's scores against what the published code does: cat, abs, kthvalue."""
    generator = torch.Generator().manual_seed(0)
    shapes = [layer.geometry.weight_shape for layer in layers for _ in range(layer.count)]
    scores = [torch.randn(shape, generator=generator) for shape in shapes]
    total = sum(tensor.numel() for tensor in scores)
    pruned = int((1 - density) * total)

    def published() -> Tensor:
        return torch.cat([tensor.abs().flatten() for tensor in scores]).kthvalue(pruned).values

    def ours() -> Tensor:
        return select_threshold(scores, kept=total - pruned)[0]

    if float(ours()) <= float(published()):
        raise RuntimeError("bench_selection: expected the smallest kept above the largest pruned magnitude")
    samples = interleave({"torch.kthvalue": published, "select_threshold": ours}, rounds)
    ratio = compare(samples["torch.kthvalue"], samples["select_threshold"])
    return {
        "scores": total,
        "density": density,
        **{name: sample.to_dict() for name, sample in samples.items()},
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
    }


def measure_ceilings() -> dict[str, float]:
    """GFLOP/s of multiply-adds in registers by dtype, all threads together: what no kernel here can beat.

    Without instructions for bfloat16 that is multiplied as float32.
    """
    rate, threads = native.library().multiply_rate, torch.get_num_threads()
    full = float(rate("float32", threads))
    return {"float32": full, "bfloat16": float(rate("bfloat16", threads)) or full}


def measure_copy_gb_per_s() -> float:
    """Gigabytes a second that a copy far beyond the caches reads and writes, all threads together."""
    source, target = (torch.ones(_COPY_FLOATS) for _ in range(2))
    return 8e-9 * _COPY_FLOATS / _least_seconds(lambda: target.copy_(source))


def roofline(row: dict[str, Any], ceilings: dict[str, float], copy_gb_per_s: float) -> dict[str, Any]:
    """Least possible ms of a row's kept work and traffic, what bounds it, and the share that was achieved.

    Layers whose tensors stay in the caches may beat the floor of the traffic.
    """
    kernel = row["kernel"]
    is_bf16 = row["dtype"] == "bfloat16" and (kernel == "dense" or kernel.endswith(("amx", "bf16")))
    rate = ceilings["bfloat16" if is_bf16 else "float32"]
    compute_ms = row["gflops_effective"] * row["sparse"]["median_ms"] / rate
    traffic_ms = row["least_mb"] / copy_gb_per_s
    floor = max(compute_ms, traffic_ms)
    return {
        "floor_ms": floor,
        "bound_by": "compute" if compute_ms >= traffic_ms else "traffic",
        "share": floor / row["sparse"]["median_ms"],
    }


def _least_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_COPY_ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def make_input(layer: Layer, batch: int) -> Tensor:
    """Random float32 input of a layer, the same at each call: [N, C], or [N, C, H, W] channels_last."""
    generator = torch.Generator().manual_seed(1)
    if layer.is_linear:
        return torch.randn(batch, layer.geometry.in_channels, generator=generator)
    x = torch.randn(batch, layer.geometry.in_channels, layer.height, layer.width, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def make_weight(layer: Layer) -> nn.Conv2d | nn.Linear:
    """He-scaled weights, as sparse and dense share them."""
    dense = layer.build()
    nn.init.kaiming_normal_(dense.weight, generator=torch.Generator().manual_seed(2))
    return dense.eval()


def make_mask(layer: Layer, dense: nn.Conv2d | nn.Linear, variant: Variant) -> Tensor:
    """Exactly round-half-up(density · units) units, drawn uniformly; of channels the square root each way."""
    generator = torch.Generator().manual_seed(variant.seed)
    shape = tuple(dense.weight.shape)
    if isinstance(variant.pattern, Channel):
        kept = [draw_units((size,), math.sqrt(variant.density), generator) for size in shape[:2]]
        return (
            (kept[0][:, None] & kept[1]).view(*shape[:2], *(1 for _ in shape[2:])).expand(shape).contiguous()
        )
    units = draw_units(variant.pattern.units_shape(shape), variant.density, generator)
    return variant.pattern.expand(units, shape).contiguous()


def make_sparse(dense: nn.Conv2d | nn.Linear, mask: Tensor, variant: Variant) -> SparseConv2d | SparseLinear:
    """The packed layer, in evaluation mode."""
    kernel = "" if variant.kernel == "auto" else variant.kernel
    if isinstance(dense, nn.Conv2d):
        return SparseConv2d.from_dense(dense, mask, variant.pattern, variant.dtype, kernel).eval()
    return SparseLinear.from_dense(dense, mask, variant.pattern, variant.dtype, kernel).eval()


def _check(layer: Layer, dense: nn.Conv2d | nn.Linear, mask: Tensor, x: Tensor, y: Tensor) -> None:
    """A figure of a wrong result is worth nothing."""
    expected = _masked(layer, dense, mask)(x.float())
    error = float((y.float() - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE[x.dtype]:
        raise RuntimeError(
            f"bench_layer: expected the outputs of {layer.name}, got a relative error of {error}"
        )


def _masked(layer: Layer, dense: nn.Conv2d | nn.Linear, mask: Tensor) -> nn.Conv2d | nn.Linear:
    masked = layer.build()
    masked.weight.copy_(dense.weight * mask)
    return masked


def _row(
    layer: Layer,
    batch: int,
    variant: Variant,
    mask: Tensor,
    module: SparseConv2d | SparseLinear,
    x: Tensor,
    sample: Sample,
    engines: dict[str, Sample],
) -> dict[str, Any]:
    g = layer.geometry
    flops = g.flops(batch, layer.height, layer.width)
    real_density = float(mask.float().mean())
    best = min(engines, key=lambda name: engines[name].median_ms)
    ratios = {name: compare(engine, sample) for name, engine in engines.items()}
    return {
        "layer": layer.name,
        "count": layer.count,
        "in_channels": g.in_channels,
        "out_channels": g.out_channels,
        "kernel_size": list(g.kernel_size),
        "stride": g.stride[0],
        "padding": g.padding[0],
        "groups": g.groups,
        "height": layer.height,
        "width": layer.width,
        "batch": batch,
        "pattern": variant.pattern.spec,
        "density": variant.density,
        "weight_density": real_density,
        "dtype": dtype_name(variant.dtype),
        "seed": variant.seed,
        "asked": variant.kernel,
        "kernel": module.kernel_for(x),
        "sparse": sample.to_dict(),
        "dense": {name: engine.to_dict() for name, engine in engines.items()},
        "ratios": {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "best_dense": best,
        "speedup": ratios[best].median,
        "gflops_dense_equivalent": flops / sample.median_ms / 1e6,
        "gflops_effective": real_density * flops / sample.median_ms / 1e6,
        "least_mb": _least_mb(layer, batch, real_density, variant.dtype),
    }


def _least_mb(layer: Layer, batch: int, density: float, dtype: torch.dtype) -> float:
    """Input, kept weights and output once each."""
    g = layer.geometry
    P, Q = g.output_size(layer.height, layer.width)
    moved = batch * (g.in_channels * layer.height * layer.width + g.out_channels * P * Q)
    return (moved + density * math.prod(g.weight_shape)) * dtype.itemsize / 1e6
