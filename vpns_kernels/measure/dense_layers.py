"""How long does each layer take densely, and what is it? Each alone, on what a forward pass gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.measure.deployed import record_layers
from vpns_kernels.measure.opponents import find_opponents
from vpns_kernels.measure.timing import drop_hopeless, interleave
from vpns_kernels.patterns import Pattern

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Call:
    name: str
    layer: nn.Conv2d | nn.Linear
    x: Tensor


@torch.no_grad()
def time_dense_layers(
    network: nn.Module, x: Tensor, rounds: int, pattern: Pattern | None = None, rest_s: float = 0.0
) -> list[dict[str, Any]]:
    """A row for each convolution and linear layer, in order of execution.

    Args:
        network: in evaluation mode, zeros where it is pruned.
        pattern: whose units are counted, where given.

    Returns:
        Plain values: layer, shape, weight_density, density (of the pattern's units), flops, best_dense,
        dense_ms.
    """
    return [_time(call, rounds, pattern, rest_s) for call in _record(network, x)]


@torch.no_grad()
def list_layers(network: nn.Module, x: Tensor, pattern: Pattern | None = None) -> list[dict[str, Any]]:
    """The rows of `time_dense_layers` without the times: nothing is measured."""
    return [_tell(call, pattern) for call in _record(network, x)]


def _record(network: nn.Module, x: Tensor) -> list[_Call]:
    return [_Call(*call) for call in record_layers(network, x, (nn.Conv2d, nn.Linear))]


def _time(call: _Call, rounds: int, pattern: Pattern | None, rest_s: float) -> dict[str, Any]:
    calls: dict[str, Callable[[], Tensor]] = {
        name: opponent.call
        for name, opponent in find_opponents(call.layer, call.x, [f"torch {d}" for d in _DTYPES]).items()
        if opponent.call is not None
    }
    once = interleave(calls, 1, warmup=0, rest_s=rest_s)
    samples = interleave(drop_hopeless(calls, once), rounds, rest_s=rest_s)
    best = min(samples, key=lambda name: samples[name].median_ms)
    return _tell(call, pattern) | {"best_dense": best, "dense_ms": samples[best].median_ms}


def _tell(call: _Call, pattern: Pattern | None) -> dict[str, Any]:
    geometry = ConvGeometry.from_module(call.layer)
    is_linear = isinstance(call.layer, nn.Linear)
    height, width = (1, 1) if is_linear else tuple(call.x.shape[2:])
    return {
        "layer": call.name,
        "shape": geometry.describe(None if is_linear else (height, width)),
        "density": _unit_density(call.layer, pattern),
        "weight_density": float((call.layer.weight != 0).float().mean()),
        "flops": geometry.flops(
            call.x.numel() // call.x.shape[-1] if is_linear else len(call.x), height, width
        ),
    }


def _unit_density(layer: nn.Conv2d | nn.Linear, pattern: Pattern | None) -> float:
    kept = (layer.weight != 0).float()
    if pattern is not None:
        kept = (pattern.reduce_sum(kept) > 0).float()
    return float(kept.mean())
