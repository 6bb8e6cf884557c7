"""How is a whole network measured on a GPU? By CUDA events, against torch and its compiler at their best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels.engine.graphs import CudaRecorder
from vpns_kernels.measure.dense_layers import list_layers
from vpns_kernels.measure.deployed import Deployment
from vpns_kernels.measure.subject import Call, Opponent, Subject, cast_input, cast_network, without_grad
from vpns_kernels.measure.timing import Sample
from vpns_kernels.measure.whole_network import Clock, Rivals, Settings
from vpns_kernels.patterns import Pattern

EAGER, AUTOTUNED = "torch bfloat16", "torch.compile bfloat16"
GPU_OPPONENTS = (EAGER, AUTOTUNED)


def find_gpu(name: str) -> torch.device:
    """The GPU of that name.

    Raises:
        ValueError: another kind of device, or a GPU that torch cannot use.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"bench: expected device cpu or cuda, got {name!r}") from error
    if device.type != "cuda":
        raise ValueError(f"bench: expected device cpu or cuda, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(
            f"bench: expected a GPU that torch can use as {name!r}, got {count} "
            "(on the CPU: --device cpu, or without that option)"
        )
    return torch.device("cuda", device.index or 0)


def find_gpu_rivals(network: nn.Module, x: Tensor, names: Iterable[str] | None = None) -> Rivals:
    """Torch's eager bfloat16, recorded as a CUDA graph, and its compiler fully tuned, which takes minutes.

    Args:
        x: [N, C, H, W] float32 on the GPU.
        names: both by default.

    Raises:
        ValueError: a name that is none of them.
        NotImplementedError: one that cannot run here.
    """
    asked = tuple(GPU_OPPONENTS if names is None else names)
    if unknown := [name for name in asked if name not in GPU_OPPONENTS]:
        raise ValueError(f"bench: expected opponents on a GPU in {list(GPU_OPPONENTS)}, got {unknown}")
    subject = Subject(copy.deepcopy(network).to(x.device), x)
    calls: dict[str, Call] = {}
    for name in asked:
        cast = cast_network(subject.network, torch.bfloat16)
        found = subject.check(Opponent(name, _MAKERS[name](cast, cast_input(x, torch.bfloat16))))
        if found.call is None:
            raise NotImplementedError(f"bench: expected the dense engine {name!r}, got: {found.why_not}")
        calls[name] = found.call
    return Rivals(calls, needed=GPU_OPPONENTS)


def gpu_clock(device: torch.device) -> Clock:
    """How a GPU's time is told to `bench_whole`."""
    return Clock(partial(interleave_events, device=device), _layers, _take)


def interleave_events(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    rest_s: float = 0.0,
    *,
    device: torch.device,
    make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
) -> dict[str, Sample]:
    """Time callables in turn (see timing.interleave), each between two events of the device's current stream.

    Args:
        rest_s: none is needed, for nothing of a GPU waits in a loop.
    """
    stream = torch.cuda.current_stream(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            begin, end = make_event(), make_event()
            begin.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            if number >= warmup:
                times[name].append(float(begin.elapsed_time(end)))
    return {name: Sample(tuple(taken)) for name, taken in times.items()}


def _layers(
    network: nn.Module, deployed: Deployment, x: Tensor, pattern: Pattern | None, settings: Settings
) -> list[dict[str, Any]]:
    """Dense times are those by which the engine chose, of cuDNN with what follows the layer."""
    dense_ms = deployed.dense_ms()
    return [
        row | {"best_dense": "torch", "dense_ms": dense_ms.get(row["layer"])}
        for row in list_layers(network, x.cpu(), pattern)
    ]


def _take(x: Tensor, dtype: str) -> Tensor:
    """In the type and order of the network: the dense engines have that before they are timed, too."""
    return cast_input(x, getattr(torch, dtype))


def _eager(network: nn.Module, x: Tensor) -> Call:
    """Recorded: what Python costs between torch's kernels is not the opponent's fault."""
    call = without_grad(network, x)
    if x.device.type != "cuda":
        return call
    y, replay = CudaRecorder(x.device).record(call)

    def play() -> Tensor:
        replay()
        return y

    return play


def _autotuned(network: nn.Module, x: Tensor) -> Call:
    # Networks before this one count against a limit, beyond which nothing is compiled.
    torch._dynamo.reset()
    compiled = torch.compile(network, mode="max-autotune", dynamic=False)
    call = without_grad(compiled, x)
    call()
    return call


_MAKERS: dict[str, Callable[[nn.Module, Tensor], Call]] = {EAGER: _eager, AUTOTUNED: _autotuned}
