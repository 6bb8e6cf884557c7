"""Is a pruned network, as it is deployed, faster than the fastest dense engine? Whole, and by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels.engine import Engine
from vpns_kernels.measure.dense_layers import time_dense_layers
from vpns_kernels.measure.deployed import Deployed, Deployment
from vpns_kernels.measure.opponents import OPPONENTS, find_opponents
from vpns_kernels.measure.random_network import kept_frac
from vpns_kernels.measure.subject import Call
from vpns_kernels.measure.timing import Ratio, Sample, compare, drop_hopeless, interleave
from vpns_kernels.patterns import Pattern

# Engines without which nobody may speak of the best: the compiler's and OpenVINO's bfloat16.
NEEDED_FOR_BEST = ("torch.compile bfloat16", "openvino bfloat16")
# Other networks than the one that was trained: shown, yet not what is to be beaten.
FURTHER = ("openvino int8", "deepsparse float32")
# An engine this many times slower than the fastest of its type is timed in the first rounds alone.
_NO_CONTENDER = 1.3
_FIRST_ROUNDS = 3
_TRUTH_IMAGES = 2
# Against float64, of the largest output: bfloat16 through fifty layers of random weights is off by 0.12.
_LARGEST_ERROR = 0.2
# Of a step that is no layer with weights.
_OTHER: dict[str, Any] = {"shape": "", "density": None, "best_dense": None, "dense_ms": None}


Layers = list[dict[str, Any]]


def _time_layers(
    network: nn.Module, deployed: Deployment, x: Tensor, pattern: Pattern | None, settings: Settings
) -> Layers:
    """Each layer alone, by torch."""
    return time_dense_layers(network, x, settings.layer_rounds, pattern, settings.rest_s)


@dataclass(frozen=True)
class Clock:
    """How time is told on a device.

    Args:
        interleave: as timing.interleave.
        time_layers: rows of the dense layers, as time_dense_layers has them.
        take: what the sparse network is given, of the images in float32 and its dtype.
    """

    interleave: Callable[..., dict[str, Sample]] = interleave
    time_layers: Callable[[nn.Module, Deployment, Tensor, Pattern | None, Settings], Layers] = _time_layers
    take: Callable[[Tensor, str], Tensor] = lambda x, dtype: x


@dataclass(frozen=True)
class Settings:
    """How thoroughly is measured.

    Args:
        rounds: interleaved ones of the contenders and the sparse network.
        layer_rounds: of each layer.
        rest_s: before each call, untimed.
        dtype: of the sparse network: "auto", "float32" or "bfloat16".
        engine: that is measured; by default the network is compiled for this.
        clock: of the device.
        deploy: makes a pruned network ready to run, given it, the pattern, x, dtype and engine.
    """

    rounds: int = 30
    layer_rounds: int = 10
    rest_s: float = 0.003
    dtype: str = "auto"
    engine: Engine | None = None
    clock: Clock = field(default_factory=Clock)
    deploy: Callable[..., Deployment] = Deployed


@dataclass(frozen=True)
class Rivals:
    """Dense engines that hold the dense network and an input, and what is missing of those asked for.

    Args:
        needed: without which nobody may speak of the best.
    """

    calls: dict[str, Call]
    why_not: dict[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = NEEDED_FOR_BEST

    @property
    def counts(self) -> bool:
        """Whether the fastest of these may be called the best dense engine."""
        return all(name in self.calls for name in self.needed)


def find_rivals(network: nn.Module, x: Tensor, names: Iterable[str] | None = None) -> Rivals:
    """Dense engines made ready.

    Args:
        names: all that are installed by default, and then none but FURTHER ones may be missing.

    Raises:
        NotImplementedError: an engine that cannot run here; says which others may be named.
    """
    asked = tuple(OPPONENTS if names is None else names)
    found = find_opponents(network, x, asked)
    why_not = {name: str(o.why_not) for name, o in found.items() if o.call is None}
    needed = [name for name in why_not if names is not None or name not in FURTHER]
    calls = {name: opponent.call for name, opponent in found.items() if opponent.call is not None}
    if needed:
        raise NotImplementedError(
            f"bench: expected the dense engine {needed[0]!r}, got: {why_not[needed[0]]} (the fastest of the "
            f"others may be named with --opponents {','.join(repr(name) for name in calls) or 'NAMES'})"
        )
    return Rivals(calls, why_not)


@torch.no_grad()
def bench_whole(
    rivals: Rivals, pruned: Iterable[nn.Module], pattern: Pattern | None, x: Tensor, settings: Settings
) -> dict[str, Any]:
    """Time pruned networks, deployed, in turn with the dense engines.

    Args:
        rivals: with the same x.
        pruned: one network for each seed of its mask, in evaluation mode, zeros where pruned.
        pattern: whose units are counted.
        x: [N, C, H, W] float32, on the device of the clock.

    Returns:
        Plain values. sparse_ms and speedup are medians over the seeds; the interval is that of the seed in
        the middle; max_rel_err is the largest, against float64. Layers are those of the first seed.

    Raises:
        RuntimeError: outputs that are not those of the pruned network.
    """
    calls: dict[str, Call] = {}
    errors: list[float] = []
    layers: list[dict[str, Any]] = []
    sparse_dtype, weight_density = "", 1.0
    for number, network in enumerate(pruned):
        deployed = settings.deploy(network, pattern, x, settings.dtype, settings.engine)
        calls[f"sparse {number}"] = partial(deployed, settings.clock.take(x, deployed.dtype))
        errors.append(_largest_error(network, deployed(x), x))
        if number == 0:
            dense_rows = settings.clock.time_layers(network, deployed, x, pattern, settings)
            layers = _join(dense_rows, deployed.rows())
            sparse_dtype, weight_density = deployed.dtype, kept_frac(network)
    samples = _race(rivals.calls, calls, settings)
    best = _fastest(rivals.calls, samples)
    seeds = [_seed_row(number, name, samples, best) for number, name in enumerate(calls)]
    middle = sorted(seeds, key=lambda row: row["speedup"])[len(seeds) // 2]
    total = sum(row["ms"] for row in layers)
    for row in layers:
        row["share"] = row["ms"] / total
    flops = sum(row["flops"] for row in layers)
    return {
        "device": x.device.type,
        "sparse_ms": median(row["sparse_ms"] for row in seeds),
        "sparse_dtype": sparse_dtype,
        "weight_density": weight_density,
        "dense": {name: samples[name].to_dict() for name in rivals.calls},
        "why_not": rivals.why_not,
        "best_dense": best,
        "best_dense_counts": rivals.counts,
        "dense_ms": samples[best].median_ms,
        "speedup": median(row["speedup"] for row in seeds),
        "speedup_low": middle["speedup_low"],
        "speedup_high": middle["speedup_high"],
        "against": _ratios(samples, [f"sparse {middle['seed']}"], rivals.calls),
        "max_rel_err": max(errors),
        "sparse_flops_frac": sum(r["flops"] for r in layers if r["choice"] == "sparse") / flops,
        "flops_ratio": flops / sum(row["flops"] * row["weight_density"] for row in layers),
        "seeds": seeds,
        "layers": layers,
    }


def _race(dense: Mapping[str, Call], sparse: Mapping[str, Call], settings: Settings) -> dict[str, Sample]:
    """Samples of all; those of contenders and sparse networks are of the same rounds."""
    everybody = {**dense, **sparse}
    interleave = settings.clock.interleave
    # Each was called when it was made ready.
    once = interleave(everybody, 1, warmup=0, rest_s=settings.rest_s)
    hopeful = drop_hopeless(dense, once)
    rounds = min(_FIRST_ROUNDS, settings.rounds)
    first = once | interleave({**hopeful, **sparse}, rounds, warmup=1, rest_s=settings.rest_s)
    contenders = {
        name: call for name, call in hopeful.items() if name in FURTHER or _may_win(name, hopeful, first)
    }
    return first | interleave({**contenders, **sparse}, settings.rounds, warmup=1, rest_s=settings.rest_s)


def _may_win(name: str, dense: Mapping[str, Call], first: Mapping[str, Sample]) -> bool:
    """Against engines of its own type: the fastest float32 is looked for, too."""
    dtype = name.split()[-1]
    fastest = min(first[other].median_ms for other in dense if other.split()[-1] == dtype)
    return first[name].median_ms <= _NO_CONTENDER * fastest


def _fastest(dense: Mapping[str, Call], samples: Mapping[str, Sample]) -> str:
    # What was timed in the first rounds alone was clearly slower there; three times by chance tell no more.
    rounds = max(len(samples[name].times_ms) for name in dense)
    timed = [name for name in dense if len(samples[name].times_ms) == rounds]
    names = [name for name in timed if name not in FURTHER] or timed
    return min(names, key=lambda name: samples[name].median_ms)


def _seed_row(number: int, name: str, samples: Mapping[str, Sample], best: str) -> dict[str, Any]:
    ratio = compare(samples[best], samples[name])
    return {
        "seed": number,
        "sparse_ms": samples[name].median_ms,
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
    }


def _ratios(
    samples: Mapping[str, Sample], sparse: Sequence[str], dense: Iterable[str]
) -> dict[str, dict[str, float]]:
    """The speed-up over each dense engine that ran in all rounds."""
    (name,) = sparse
    full = [other for other in dense if len(samples[other].times_ms) == len(samples[name].times_ms)]
    return {other: _plain(compare(samples[other], samples[name])) for other in full}


def _plain(ratio: Ratio) -> dict[str, float]:
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high}


def _join(dense: list[dict[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in order of execution: layers, dense and deployed, then what else the deployed network does."""
    names = [row["layer"] for row in dense]
    others = [{"layer": name, "flops": 0, "weight_density": 1.0} for name in ours if name not in names]
    gone = {"sparse_ms": None, "ms": 0.0, "kernel": "", "choice": "sparse", "reason": "not in the plan"}
    return [_OTHER | row | dict(ours.get(row["layer"], gone)) for row in [*dense, *others]]


def _largest_error(network: nn.Module, found: Tensor, x: Tensor) -> float:
    """Against float64, as a share of the largest output; infinite where it is no rounding at all."""
    some = x[:_TRUTH_IMAGES].cpu()
    exact: Callable[[Tensor], Tensor] = copy.deepcopy(network).double()
    truth = exact(some.double())
    off, largest = (float(t.abs().max()) for t in (found[: len(some)].cpu().double() - truth, truth))
    # Few random blocks may leave no way through a network: then all outputs are zero, of whoever is right.
    error = off / largest if largest else math.inf if off else 0.0
    if not error <= _LARGEST_ERROR:
        raise RuntimeError(
            f"bench: expected the outputs of the pruned network, got some off by {error:.2g} of the largest"
        )
    return error
