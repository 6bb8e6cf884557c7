"""I pruned it: is it faster, and if not, why? A run's network, deployed, against dense engines at hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vpns_kernels.engine import TraceError
from vpns_kernels.measure.deployed import Deployed, Deployment, Untraced
from vpns_kernels.measure.on_gpu import find_gpu_rivals, gpu_clock
from vpns_kernels.measure.opponents import find_opponents
from vpns_kernels.measure.whole_network import Clock, Rivals, Settings, bench_whole
from vpns_kernels.patterns import Pattern

# Those that are ready within seconds; torch.compile takes a minute (`vpns bench --model` asks it, too).
QUICK_OPPONENTS = (
    "torch float32",
    "torch bfloat16",
    "onnxruntime float32",
    "openvino float32",
    "openvino bfloat16",
)


def bench_network(network: nn.Module, pattern: Pattern, x: Tensor, rounds: int = 15) -> dict[str, Any]:
    """Time a pruned network as it is deployed, in turn with the dense engines that are installed.

    On a CPU these are the quick ones, on a GPU torch and its compiler, fully tuned. A network that cannot be
    traced runs as torch calls its layers.

    Args:
        network: plain, on the CPU, in evaluation mode, zeros where pruned.
        x: [N, 3, H, W] float32, what the network sees, on the device where it is to run.
        rounds: how often each is timed; medians count.

    Returns:
        Plain values: device, image_size, batch, dense (by engine), best_dense, dense_ms, dense_dtype,
        sparse_ms, sparse_dtype, speedup with its 95 % interval, max_rel_err, sparse_flops_frac, layers.

    Raises:
        NotImplementedError: a GPU's dense engine that cannot run.
        RuntimeError: outputs that are not the network's.
    """
    if x.device.type == "cpu":
        return _bench(_find_quick_rivals(network, x), Clock(), network, pattern, x, rounds)
    return _bench(find_gpu_rivals(network, x), gpu_clock(x.device), network, pattern, x, rounds)


def _bench(
    rivals: Rivals, clock: Clock, network: nn.Module, pattern: Pattern, x: Tensor, rounds: int
) -> dict[str, Any]:
    settings = Settings(rounds, clock=clock, deploy=_deploy)
    cell = bench_whole(rivals, [network], pattern, x, settings)
    dtype = cell["best_dense"].split()[-1]
    whole = ("device", "dense", "best_dense", "dense_ms", "sparse_ms", "sparse_dtype", "sparse_flops_frac")
    ratio = ("speedup", "speedup_low", "speedup_high", "max_rel_err")
    return {
        "image_size": x.shape[-1],
        "batch": len(x),
        **{key: cell[key] for key in (*whole, *ratio)},
        "dense_dtype": dtype,
        "layers": [_tell(row, pattern, dtype) for row in cell["layers"] if row["density"] is not None],
    }


def _find_quick_rivals(network: nn.Module, x: Tensor) -> Rivals:
    found = find_opponents(network, x, QUICK_OPPONENTS)
    why_not = {name: str(opponent.why_not) for name, opponent in found.items() if opponent.call is None}
    return Rivals({name: o.call for name, o in found.items() if o.call is not None}, why_not)


def _deploy(network: nn.Module, pattern: Pattern, x: Tensor, dtype: str, engine: None) -> Deployment:
    try:
        return Deployed(network, pattern, x, dtype, engine)
    except TraceError:
        return Untraced(network, pattern, x)


def _tell(row: dict[str, Any], pattern: Pattern, dense_dtype: str) -> dict[str, Any]:
    dense_ms, sparse_ms = row["dense_ms"], row["sparse_ms"]
    told = ("layer", "shape", "density", "choice", "kernel", "reason", "flops", "share")
    return {
        **{name: row[name] for name in told},
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "pattern": pattern.spec,
        "dense_dtype": dense_dtype,
        "speedup": None if None in (dense_ms, sparse_ms) else dense_ms / sparse_ms,
    }
