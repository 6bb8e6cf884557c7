"""How fast is a whole pruned network on a GPU, against torch and its compiler at their best?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_targets import AUTOTUNED, CUDNN
from vpns_kernels import compile
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.measure import on_gpu
from vpns_kernels.measure.gpu import clock_of
from vpns_kernels.measure.on_gpu import find_gpu_rivals
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
# By what reports call them.
_ENGINES = {on_gpu.EAGER: CUDNN, on_gpu.AUTOTUNED: AUTOTUNED}


@dataclass(frozen=True, eq=False)
class DenseNetwork:
    """A network with drawn weights, and the dense engines that hold it.

    Args:
        model: its name.
        network: on the CPU.
        x: [N, 3, H, W] float32 on the device.
    """

    model: str
    network: nn.Module
    x: Tensor
    calls: Mapping[str, Callable[[], object]]


def make_dense(model: str, network: nn.Module, x: Tensor, is_autotuned: bool) -> DenseNetwork:
    """The network with weights drawn anew, in torch's bfloat16.

    Args:
        is_autotuned: whether the compiler is asked for its best, too, which takes minutes to find.

    Raises:
        RuntimeError: an engine that cannot run, or whose outputs are not the network's.
    """
    dense = scale_weights(network)
    rivals = find_gpu_rivals(dense, x, list(_ENGINES) if is_autotuned else [on_gpu.EAGER])
    return DenseNetwork(model, dense, x, {_ENGINES[name]: call for name, call in rivals.calls.items()})


def bench_gpu_network(dense: DenseNetwork, form: Form, rounds: int) -> Row:
    """One pattern and density, in turn with the dense engines.

    Raises:
        RuntimeError: outputs that are not the network's.
    """
    (pattern, density), x, dtype = form, dense.x, torch.bfloat16
    kind = parse_pattern(pattern)
    pruned = prune_randomly(dense.network, kind, density, 0, x[:_CALIBRATION_IMAGES].cpu())
    engine = compile(shrink(pruned) if isinstance(kind, Channel) else pruned, x, dtype=dtype)
    with torch.no_grad():
        truth = pruned.to(x.device)(x[:2])
    error = float((engine(x)[:2] - truth).abs().max() / truth.abs().max())
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"bench_gpu_network: expected the outputs of {dense.model}, got an error of {error}"
        )
    given = x.to(dtype).contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {**dense.calls, "ours": lambda: engine(given)}
    samples = interleave(
        {name: _awaited(call, x.device) for name, call in calls.items()}, rounds, warmup=_WARM_UP
    )
    ours, report = samples["ours"], engine.explain(quiet=True)
    return {
        "model": dense.model,
        "pattern": pattern,
        "density": density,
        "batch": len(x),
        "size": x.shape[-1],
        "dtype": dtype_name(dtype),
        "ours": ours.to_dict(),
        "dense": {name: samples[name].to_dict() for name in dense.calls},
        "ratios": {name: asdict(compare(samples[name], ours)) for name in dense.calls},
        "best_dense": min(dense.calls, key=lambda name: samples[name].median_ms),
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
