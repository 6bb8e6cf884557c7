"""How does a network become an Engine? Traced, lowered, packed, and timed step by step on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine.drafts import Lowered
from vpns_kernels.engine.engine import Engine, check_threads
from vpns_kernels.engine.gpu import GpuEngine
from vpns_kernels.engine.gpu_compile import choose_kernels, device_dtype
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.report import StepReport, describe_pruning
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.strips import CLEARLY, with_strips
from vpns_kernels.engine.trace import Traced, trace_network

DType = Literal["auto", "float32", "bfloat16"]
# Images that a thread may take along at a time: few stay in its cache, many fill vectors of images.
_CHUNKS = (1, 2, 4, 8, 16)
_REPEATS = 3
# Repeats while a layer looks slower without most of its products: something else may have had the cores.
_MOST_REPEATS = 12


def compile(
    model: nn.Module, example_input: Tensor, dtype: DType | torch.dtype = "auto", threads: int | None = None
) -> Engine:
    """Compile a pruned (or dense) network for this machine: for the CPU, or the GPU that the example is on.

    The network is traced; batch norms, residuals and activations become part of the layers before them; each
    layer is packed by the pattern that its mask, or its zeros, obey. Then it is timed with and without what
    was pruned, layer by layer, and each layer gets the faster of the two: dense is a normal choice. What no
    native step computes is left to torch, and `Engine.explain` says what and why.

    Args:
        model: any nn.Module in evaluation mode that takes one batch of images; masked networks, networks with
            sparse layers, and plain ones pruned by any tool, whose zeros are their mask.
        example_input: [N, C, H, W]. Height and width are fixed by it; the batch size is not, but what is
            chosen serves batches of this size best. On a GPU the engine is for that GPU, wherever the model
            is: dense layers run by cuDNN, and each batch size is recorded once, as a CUDA graph.
        dtype: of activations and weights inside; "auto" takes bfloat16 where the machine multiplies it
            natively. Sums are float32.
        threads: of each call; torch's number by default; not for a GPU.

    Raises:
        ValueError, TypeError: a model in training mode, another input.
        TraceError: torch.export cannot follow the network, or it returns anything but one tensor.
        LoweringError: that tensor is no activation, or the images themselves.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
        >>> engine = compile(network, torch.zeros(1, 3, 8, 8))
        >>> engine(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile: expected a module, got {type(model).__name__}")
    _check_input(example_input)
    check_threads("compile", threads)
    device = example_input.device
    if device.type != "cpu" and threads is not None:
        raise ValueError(f"compile: expected no threads for {device}, got {threads}")
    chosen = _dtype(dtype, device)
    example = example_input.detach().float()
    traced = trace_network(model, example)
    lowered = lower(traced)
    _cast_programs(lowered, chosen, example)
    if device.type != "cpu":
        notes = {program.name: program.note for program in lowered.programs}
        return choose_kernels(draft_plan(lowered, chosen, {}), lowered.programs, device, example, notes)
    threads_now = threads or torch.get_num_threads()
    twins = _Twins(lowered, chosen, threads)
    best: _Timed | None = None
    for chunk in _CHUNKS:
        if best is not None and chunk * threads_now > len(example):
            break
        timed = twins.time(chunk, example[: chunk * threads_now])
        if best is None or timed.ms_per_image < CLEARLY * best.ms_per_image:
            best = timed
    assert best is not None
    plan = draft_plan(lowered, chosen, best.is_sparse, best.chunk)
    steps = [
        replace(step, kernel=report.kernel) for step, report in zip(plan.steps, best.reports, strict=True)
    ]
    plan = replace(plan, steps=tuple(steps))
    engine = Engine(plan, best.reports, threads=threads, programs=lowered.programs)
    if len(example) >= threads_now:
        engine = with_strips(engine, example[: best.chunk * threads_now])
    return _choose(engine, traced, chosen, example) if lowered.programs else engine


def _cast_programs(lowered: Lowered, dtype: torch.dtype, example: Tensor) -> None:
    """What is left to torch runs in the network's type, where torch computes all of it in that type."""
    if dtype == torch.float32 or not lowered.programs:
        return
    cast = [program.cast(dtype) for program in lowered.programs]
    try:
        plan = draft_plan(lowered, dtype, {})
        if example.device.type == "cpu":
            Engine(plan, programs=cast)(example[:1])
        else:
            GpuEngine(plan, example.device, programs=cast, is_recorded=False)(example[:1])
    except RuntimeError as error:
        why = f"in float32, as torch lacks some of it in {dtype_name(dtype)}: {str(error).splitlines()[0]}"
        cast = [replace(program, note=f"{program.note} ({why})") for program in lowered.programs]
    lowered.programs = cast


def _choose(engine: Engine, traced: Traced, dtype: torch.dtype, example: Tensor) -> Engine:
    """The engine, or torch alone where its borders cost more than native steps gain."""
    lowered = lower(traced, is_native=False)
    _cast_programs(lowered, dtype, example)
    plan = draft_plan(lowered, dtype, {})
    alone = Engine(plan, threads=engine.threads, programs=lowered.programs)
    times: dict[Engine, list[float]] = {engine: [], alone: []}
    for _ in range(_REPEATS + 1):
        for rival, taken in times.items():
            started = time.perf_counter()
            rival(example)
            taken.append(1e3 * (time.perf_counter() - started) / len(example))
    mixed_ms, alone_ms = (min(taken[1:]) for taken in times.values())
    if alone_ms >= CLEARLY * mixed_ms:
        return engine
    note = f"torch alone takes {alone_ms:.3f} ms, {mixed_ms:.3f} with native steps between"
    note = f"{note}: {lowered.programs[0].note}"
    reports = [
        StepReport(step.name, None, None, 0.0 if place else alone_ms, "torch", note)
        for place, step in enumerate(plan.steps)
    ]
    return Engine(plan, reports, threads=engine.threads, programs=lowered.programs)


@dataclass(frozen=True)
class _Timed:
    """What one number of images at a time gives: the better form of each layer, and how long all take."""

    chunk: int
    ms_per_image: float
    is_sparse: dict[str, bool]
    reports: list[StepReport]


class _Twins:
    """The network twice: without what was pruned, and with everything."""

    def __init__(self, lowered: Lowered, dtype: torch.dtype, threads: int | None) -> None:
        self._lowered = lowered
        kept = [1.0 if d.kept is None else float(d.kept.float().mean()) for d in lowered.steps]
        self._pruned = [share < 1 for share in kept]
        self._mostly_pruned = [share < 0.5 for share in kept]
        plan = draft_plan(lowered, dtype, {})
        self._sparse = self._dense = Engine(plan, threads=threads, programs=lowered.programs)
        if any(self._pruned):
            plan = draft_plan(lowered, dtype, dict.fromkeys([step.name for step in plan.steps], False))
            self._dense = Engine(plan, threads=threads, programs=lowered.programs)

    def time(self, chunk: int, x: Tensor) -> _Timed:
        """What some images at a time for each thread cost."""
        sparse, dense = self._least_times(chunk, x)
        notes = {program.name: program.note for program in self._lowered.programs}
        reports = []
        per_image_ms = 1e3 / len(x)
        for place, step in enumerate(self._sparse.plan.steps):
            ours, theirs = sparse[place] * per_image_ms, dense[place] * per_image_ms
            takes_sparse = self._pruned[place] and ours < theirs
            kernel = (self._sparse if takes_sparse else self._dense).kernels[place]
            known = (ours if self._pruned[place] else None, theirs if step.layer is not None else None)
            note = notes.get(self._lowered.steps[place].layer, "") if step.op == "torch" else ""
            ms, left = ours if takes_sparse else theirs, describe_pruning(step)
            reports.append(StepReport(step.name, *known, ms, kernel, note, **left, is_sparse=takes_sparse))
        total = sum(report.ms for report in reports)
        return _Timed(chunk, total, {report.name: report.is_sparse for report in reports}, reports)

    def _least_times(self, chunk: int, x: Tensor) -> tuple[list[float], list[float]]:
        """Seconds of each step without what was pruned and with everything, taken in turn."""
        engines = [self._sparse] if self._dense is self._sparse else [self._sparse, self._dense]
        least = [[math.inf] * len(self._pruned) for _ in engines]
        for engine in engines:
            engine.set_chunk(chunk)
            engine(x)
        for repeat in range(_MOST_REPEATS):
            for place, engine in enumerate(engines):
                least[place] = list(map(min, least[place], engine.profile(x)))
            sparse, dense = least[0], least[-1]
            doubts = [
                mostly and ours >= theirs
                for mostly, ours, theirs in zip(self._mostly_pruned, sparse, dense, strict=True)
            ]
            if repeat + 1 >= _REPEATS and not any(doubts):
                break
        return sparse, dense


def _dtype(dtype: DType | torch.dtype, device: torch.device) -> torch.dtype:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto" and device.type != "cpu":
        return device_dtype(device)
    if dtype == "auto":
        has = native.has_isa("avx512_bf16") or native.has_isa("amx")
        return torch.bfloat16 if has else torch.float32
    found = named.get(dtype) if isinstance(dtype, str) else dtype
    if found not in named.values():
        raise ValueError(f"compile: expected dtype 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    assert found is not None
    return found


def _check_input(example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise TypeError(f"compile: expected a tensor as example_input, got {type(example).__name__}")
    if example.dim() != 4 or not example.is_floating_point() or 0 in example.shape:
        raise ValueError(
            "compile: expected a floating example_input [N, C, H, W], "
            f"got {example.dtype} {list(example.shape)}"
        )
    if example.device.type not in ("cpu", "cuda"):
        raise ValueError(f"compile: expected example_input on the CPU or a GPU, got {example.device}")
