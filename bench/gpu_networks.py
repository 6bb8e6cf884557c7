"""How fast is a whole pruned network on a GPU, against torch and its compiler at their best?"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
_CALIBRATION_IMAGES = 8
Row = dict[str, Any]
Form = tuple[str, float]


class Rivals:
    """A dense network in the engines that ours is compared with.

    Args:
        model: its name.
        network: with weights of any kind, on the CPU; drawn anew.
        x: [N, 3, H, W] float32 on the device.
        is_autotuned: whether the compiler is asked for its best, which takes minutes to find.
    """

    def __init__(
        self,
        model: str,
        network: nn.Module,
        x: Tensor,
        is_autotuned: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.model, self.x, self.dtype = model, x, dtype
        self.dense = scale_weights(network)
        # What Python costs between torch's kernels is not the opponent's fault: it is recorded too.
        self.calls: dict[str, Callable[[], object]] = {
            CUDNN: replayable(_eager(self.dense, x, dtype), x.device, 1)
        }
        if is_autotuned:
            self.calls[AUTOTUNED] = _autotuned(self.dense, x, dtype)


def bench_gpu_network(rivals: Rivals, form: Form, rounds: int) -> Row:
    """One pattern and density, in turn with the dense engines.

    Raises:
        RuntimeError: outputs that are not the network's.
    """
    (pattern, density), x, dtype = form, rivals.x, rivals.dtype
    kind = parse_pattern(pattern)
    pruned = prune_randomly(rivals.dense, kind, density, 0, x[:_CALIBRATION_IMAGES].cpu())
    engine = compile(shrink(pruned) if isinstance(kind, Channel) else pruned, x, dtype=dtype)
    with torch.no_grad():
        truth = pruned.to(x.device)(x[:2])
    error = float((engine(x)[:2] - truth).abs().max() / truth.abs().max())
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"bench_gpu_network: expected the outputs of {rivals.model}, got an error of {error}"
        )
    given = x.to(dtype).contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {**rivals.calls, "ours": lambda: engine(given)}
    samples = interleave(
        {name: _awaited(call, x.device) for name, call in calls.items()}, rounds, warmup=_WARM_UP
    )
    ours, report = samples["ours"], engine.explain(quiet=True)
    return {
        "model": rivals.model,
        "pattern": pattern,
        "density": density,
        "batch": len(x),
        "size": x.shape[-1],
        "dtype": str(dtype)[6:],
        "ours": ours.to_dict(),
        "dense": {name: samples[name].to_dict() for name in rivals.calls},
        "ratios": {name: asdict(compare(samples[name], ours)) for name in rivals.calls},
        "best_dense": min(rivals.calls, key=lambda name: samples[name].median_ms),
        "max_rel_err": error,
        "sparse_flops_frac": report.sparse_flops_share,
        "layers": report.rows(),
    }


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
    # What was compiled before counts against a limit, beyond which nothing is compiled.
    torch._dynamo.reset()
    compiled = torch.compile(cast, mode="max-autotune", dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = compiled(given)
            return result

    call()
    return call
