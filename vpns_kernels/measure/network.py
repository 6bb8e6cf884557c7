"""I pruned it: is it faster, and if not, why? A network, dense against sparse, by layer and whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.convert import sparsify
from vpns_kernels.fusing import fuse
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.measure.timing import Sample, compare, interleave
from vpns_kernels.patterns import Block, Pattern
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

# A sparse layer replaces the dense one only where it is faster by more than what two timings differ by
# chance.
_LEAST_GAIN = 1.02
# An opponent that takes a second and is this many times slower than the fastest is timed once.
_HOPELESS = 5


@dataclass(frozen=True)
class _Layer:
    """A masked layer and what it was given in a forward pass."""

    name: str
    dense: nn.Conv2d | nn.Linear
    sparse: SparseConv2d | SparseLinear
    x: Tensor


@torch.no_grad()
def bench_network(
    network: nn.Module, masks: Mapping[str, Tensor], pattern: Pattern, x: Tensor, rounds: int = 15
) -> dict[str, Any]:
    """Time a pruned network and its dense self, interleaved in this process, layer by layer and whole.

    Each masked layer runs sparsely where that was faster here, dense otherwise; the row says which and why.
    As whole networks, sparse and dense ones are fused first (fusing.py).

    Args:
        network: plain, in eval mode, zeros where pruned.
        masks: bool weight masks by layer name.
        x: [N, 3, H, W] float32, what the network sees.
        rounds: how often each is timed; medians count.

    Returns:
        Plain values: image_size, batch, dense (by engine), best_dense, dense_ms, dense_dtype, sparse_ms,
        sparse_dtype, speedup with its 95 % interval, max_rel_err, sparse_flops_frac, layers.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    sparse_dtype = _sparse_dtype(pattern)
    dense = {torch.float32: _cast(network, torch.float32), torch.bfloat16: _cast(network, torch.bfloat16)}
    inputs = {dtype: x.to(dtype) for dtype in dense}
    sparse = sparsify(dense[sparse_dtype], masks, pattern, sparse_dtype).eval()
    _run_sparsely(sparse)
    rows = [
        _bench_layer(layer, dense[torch.float32].get_submodule(layer.name), pattern, rounds)
        for layer in _record(dense[sparse_dtype], sparse, inputs[sparse_dtype])
    ]
    chosen = {row["layer"]: masks[row["layer"]] for row in rows if row["choice"] == "sparse"}
    # Cast last, so that folded weights are rounded once.
    mixed = _run_sparsely(_cast(fuse(sparsify(dense[torch.float32], chosen, pattern)), sparse_dtype))
    fused = fuse(dense[torch.float32])

    engines: dict[str, Callable[[], Tensor]] = {
        f"torch {str(dtype)[6:]}": _call(_cast(fused, dtype), inputs[dtype]) for dtype in dense
    }
    samples = _race(engines | {"sparse": _call(mixed, inputs[sparse_dtype])}, rounds)
    best = min(engines, key=lambda name: samples[name].median_ms)
    ratio = compare(samples[best], samples["sparse"])
    truth = network.double()(x.double())
    network.float()
    error = (mixed(inputs[sparse_dtype]).double() - truth).abs().max() / truth.abs().max()
    total = samples["sparse"].median_ms
    for row in rows:
        row["share"] = row["sparse_ms" if row["choice"] == "sparse" else "dense_ms"] / total
    flops = sum(row["flops"] for row in rows)
    return {
        "device": "cpu",
        "image_size": x.shape[-1],
        "batch": x.shape[0],
        "dense": {name: samples[name].to_dict() for name in engines},
        "best_dense": best,
        "dense_ms": samples[best].median_ms,
        "dense_dtype": best.split()[1],
        "sparse_ms": total,
        "sparse_dtype": str(sparse_dtype)[6:],
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "max_rel_err": float(error),
        "sparse_flops_frac": sum(row["flops"] for row in rows if row["choice"] == "sparse") / flops,
        "layers": rows,
    }


def _race(callables: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, Sample]:
    """Interleaved samples; what is hopelessly slow (bfloat16 without instructions for it) gets one."""
    # A first call also prepares; only where it takes long is it a fair sample.
    first = interleave(callables, rounds=1, warmup=0)
    fastest = min(sample.median_ms for sample in first.values())
    limit_ms = max(_HOPELESS * fastest, 1000)
    quick = {n: call for n, call in callables.items() if n == "sparse" or first[n].median_ms <= limit_ms}
    return first | interleave(quick, rounds)


def _sparse_dtype(pattern: Pattern) -> torch.dtype:
    """bfloat16 where instructions multiply it, float32 elsewhere."""
    has_products = any(native.has_isa(name) for name in ("avx512_bf16", "amx"))
    return torch.bfloat16 if has_products and isinstance(pattern, Block) else torch.float32


def _run_sparsely(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, SparseConv2d | SparseLinear):
            # What is compared with dense must not be dense itself.
            module.kernel = "sparse"
    return network


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    cast = copy.deepcopy(network).eval().to(dtype)
    for module in cast.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return cast


def _call(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: network(x)


def _record(dense: nn.Module, sparse: nn.Module, x: Tensor) -> list[_Layer]:
    """Every masked layer with its input, in order of execution."""
    found: list[_Layer] = []
    hooks = []
    for name, module in sparse.named_modules():
        if isinstance(module, SparseConv2d | SparseLinear):

            def note(sparse_layer: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                layer = dense.get_submodule(name)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                found.append(_Layer(name, layer, sparse_layer, args[0]))

            hooks.append(module.register_forward_pre_hook(note))
    sparse(x)
    for hook in hooks:
        hook.remove()
    return found


def _bench_layer(layer: _Layer, dense32: nn.Module, pattern: Pattern, rounds: int) -> dict[str, Any]:
    x32 = layer.x.float()
    candidates: dict[str, Callable[[], Tensor]] = {"float32": lambda: dense32(x32)}
    if layer.x.dtype != torch.float32:
        candidates[str(layer.x.dtype)[6:]] = lambda: layer.dense(layer.x)
    samples = _race(candidates | {"sparse": lambda: layer.sparse(layer.x)}, rounds)
    best = min(candidates, key=lambda name: samples[name].median_ms)
    geometry = ConvGeometry.from_module(layer.dense)
    is_linear = isinstance(layer.dense, nn.Linear)
    height, width = (1, 1) if is_linear else tuple(layer.x.shape[2:])
    speedup = samples[best].median_ms / samples["sparse"].median_ms
    kernel = layer.sparse.kernel_for(layer.x)
    choice, reason = _choose(speedup, samples, kernel, layer.sparse.density)
    K, C, R, S = geometry.weight_shape
    return {
        "layer": layer.name,
        "shape": f"{C}x{K} linear" if is_linear else f"{C}→{K} {R}x{S} @{height} /{geometry.stride[0]}",
        "pattern": pattern.spec,
        "density": layer.sparse.density,
        "dense_ms": samples[best].median_ms,
        "dense_dtype": best,
        "sparse_ms": samples["sparse"].median_ms,
        "speedup": speedup,
        "choice": choice,
        "kernel": kernel if choice == "sparse" else "torch",
        "reason": reason,
        "flops": geometry.flops(layer.x.shape[0], height, width),
    }


def _choose(speedup: float, samples: Mapping[str, Sample], kernel: str, density: float) -> tuple[str, str]:
    if speedup >= _LEAST_GAIN:
        return "sparse", f"{kernel} is {speedup:.1f}x as fast as dense at density {density:.2f}"
    if density > 0.4:
        return "dense", f"{density:.0%} of the layer is kept: little to skip"
    spent = median(samples["sparse"].times_ms)
    if spent < 0.1:
        return "dense", f"a layer of {spent * 1000:.0f} µs is bound by the cost of a call, not by its weights"
    return "dense", f"moving activations costs more here than the skipped weights save ({speedup:.2f}x)"
