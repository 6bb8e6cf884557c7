"""How fast is a whole pruned network on a GPU, against torch and its compiler at their best?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_targets import AUTOTUNED, CUDNN
from vpns_kernels import compile
from vpns_kernels.engine.gpu_clock import replayable
from vpns_kernels.measure.gpu import clock_of
from vpns_kernels.measure.random_network import prune_randomly, scale_weights
from vpns_kernels.measure.timing import compare, interleave
from vpns_kernels.patterns import Channel, parse_pattern
from vpns_kernels.shrink import shrink

# Largest error, of the largest output.
_TOLERANCE = 0.1
_WARM_UP = 3
Row = dict[str, Any]
Form = tuple[str, float]


def bench_gpu_network(
    model: str,
    network: nn.Module,
    forms: Sequence[Form],
    x: Tensor,
    rounds: int,
    is_autotuned: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Row]:
    """A row for each pattern and density, all in turn with the dense engines.

    Args:
        network: with weights of any kind, on the CPU; drawn anew.
        x: [N, 3, H, W] float32 on the device.

    Raises:
        RuntimeError: outputs that are not the network's.
    """
    dense = scale_weights(network)
    few = x[:8].cpu()
    # What Python costs between torch's kernels is not the opponent's fault: it is recorded too.
    calls: dict[str, Callable[[], object]] = {CUDNN: replayable(_eager(dense, x, dtype), x.device, 1)}
    if is_autotuned:
        calls[AUTOTUNED] = _autotuned(dense, x, dtype)
    found = {}
    for pattern, density in forms:
        kind = parse_pattern(pattern)
        pruned = prune_randomly(dense, kind, density, 0, few)
        engine = compile(shrink(pruned) if isinstance(kind, Channel) else pruned, x, dtype=dtype)
        with torch.no_grad():
            truth = pruned.to(x.device).float()(x[:2]).float()
        error = float((engine(x)[:2] - truth).abs().max() / truth.abs().max())
        if not error <= _TOLERANCE:
            raise RuntimeError(f"bench_gpu_network: expected the outputs of {model}, got an error of {error}")
        found[pattern, density] = engine, error
        given = x.to(dtype).contiguous(memory_format=torch.channels_last)
        calls[f"{pattern} {density:g}"] = lambda engine=engine, given=given: engine(given)  # type: ignore[misc]
    samples = interleave(
        {name: _awaited(call, x.device) for name, call in calls.items()}, rounds, warmup=_WARM_UP
    )
    rivals = [name for name in (CUDNN, AUTOTUNED) if name in samples]
    rows = []
    for (pattern, density), (engine, error) in found.items():
        sample = samples[f"{pattern} {density:g}"]
        report = engine.explain(quiet=True)
        rows.append(
            {
                "model": model,
                "pattern": pattern,
                "density": density,
                "batch": len(x),
                "size": x.shape[-1],
                "dtype": str(dtype)[6:],
                "ours": sample.to_dict(),
                "dense": {name: samples[name].to_dict() for name in rivals},
                "ratios": {name: asdict(compare(samples[name], sample)) for name in rivals},
                "best_dense": min(rivals, key=lambda name: samples[name].median_ms),
                "max_rel_err": error,
                "sparse_flops_frac": report.sparse_flops_share,
                "layers": report.rows(),
            }
        )
    return rows


def _awaited(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Called as users call it, until the device is done."""
    clock = clock_of(device)

    def run() -> float:
        call()
        return clock()

    return run


def _cast(network: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    cast = copy.deepcopy(network).to(x.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast.eval(), x.to(dtype).contiguous(memory_format=torch.channels_last)


def _eager(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    cast, given = _cast(network, x, dtype)

    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = cast(given)
            return result

    return call


def _autotuned(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    cast, given = _cast(network, x, dtype)
    compiled = torch.compile(cast, mode="max-autotune", dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = compiled(given)
            return result

    call()
    return call
