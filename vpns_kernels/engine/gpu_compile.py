"""Which kernel runs each layer on a GPU? The fastest of those that take it, timed there on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from vpns_kernels.engine.gpu import GpuEngine, find_device
from vpns_kernels.engine.gpu_clock import measure_ms
from vpns_kernels.engine.gpu_kernels import KERNELS, LayerKernel
from vpns_kernels.engine.gpu_steps import StepPart, time_part
from vpns_kernels.engine.gpu_weights import LayerWeights
from vpns_kernels.engine.graphs import Recorder
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.programs import TorchProgram
from vpns_kernels.engine.report import StepReport, describe_pruning

# From here on GPUs multiply bfloat16.
_LEAST_CAPABILITY = (8, 0)
# Of these kernels of libraries nobody says before which sizes they take; ours and plain torch may not stop.
MAY_STOP = ("dense fused", "semi-structured")


def device_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32."""
    has_products = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    return torch.bfloat16 if has_products else torch.float32


def choose_kernels(
    plan: Plan,
    programs: Sequence[TorchProgram],
    device: torch.device,
    x: Tensor,
    notes: Mapping[str, str] | None = None,
) -> GpuEngine:
    """An engine whose layers run by what was fastest on these images.

    Args:
        plan: with packed weights; what it names as kernels does not count.
        x: [N, C, H, W] on the device.
        notes: of steps of torch, by name, why they are.
    """
    engine, images = GpuEngine(plan, device, programs=programs, is_recorded=False), len(x)
    assert plan.input is not None
    tensors, chosen, reports = {plan.input: engine.prepare(x)}, {}, {}
    with torch.no_grad():
        for part in engine.parts:
            first = plan.steps[part.steps.start]
            if isinstance(part, StepPart) and first.layer is not None:
                report, layer = _time_layer(plan, part, device, tensors, images)
                chosen[first.name] = report.kernel
                part.run_by(layer, tensors)
            else:
                kernel, note = part.kernels[0], (notes or {}).get(first.name, "")
                ms = time_part(part, device, tensors) / images
                report = StepReport(first.name, None, None, ms, kernel, note)
                part.run(tensors, None, 0, None)
            for place in part.steps:
                # A program is in as many steps as it has values; its time counts once.
                is_first = place == part.steps.start
                name = plan.steps[place].name
                reports[name] = report if is_first else replace(report, name=name, ms=0.0)
    steps = [replace(step, kernel=chosen.get(step.name, "")) for step in plan.steps]
    ordered = [reports[step.name] for step in steps]
    return build_engine(replace(plan, steps=tuple(steps)), device, chosen, ordered, programs, x)


def _time_layer(
    plan: Plan, part: StepPart, device: torch.device, tensors: Mapping[int, Tensor], images: int
) -> tuple[StepReport, LayerKernel]:
    """What each kernel that takes a layer needs per image; the fastest, ready to run, is chosen."""
    weights, step = LayerWeights.of_step(plan, part.step, device), part.step
    refusals = _triton_errors()
    layers: dict[str, LayerKernel] = {}
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, kind in KERNELS.items():
        reason = kind.why_not(weights)
        if reason is None:
            try:
                layer = layers[name] = kind.make(weights)
                ms = measure_ms(lambda: part.run_by(layer, dict(tensors)), device)  # noqa: B023
                times[name] = ms / images
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                may_stop = RuntimeError if name in MAY_STOP else ()
                if not isinstance(error, (may_stop, *refusals)):
                    raise
                refused[name] = f"it stopped: {(str(error).splitlines() or [repr(error)])[0]}"
        elif kind.is_sparse and weights.packed is not None:
            refused[name] = reason
    sparse = {name: ms for name, ms in times.items() if KERNELS[name].is_sparse}
    dense_ms = min(ms for name, ms in times.items() if name not in sparse)
    kernel = min(times, key=lambda name: times[name])
    others = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    sparse_ms = min(sparse.values(), default=None)
    left = describe_pruning(step)
    report = StepReport(
        step.name,
        sparse_ms,
        dense_ms,
        times[kernel],
        kernel,
        others=others,
        is_sparse=kernel in sparse,
        **left,
    )
    return report, layers[kernel]


def _triton_errors() -> tuple[type[Exception], ...]:
    """Errors of kernels that do not compile, or ask for more than the GPU has."""
    if find_spec("triton") is None:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def build_engine(
    plan: Plan,
    device: torch.device,
    kernels: Mapping[str, str],
    reports: Sequence[StepReport],
    programs: Sequence[TorchProgram],
    x: Tensor,
    recorder: Recorder | None = None,
) -> GpuEngine:
    """An engine that was tried; where what is left to torch cannot be recorded, its report says so.

    Raises:
        RuntimeError: a network without such programs that cannot be recorded, or no memory.
    """
    engine = GpuEngine(plan, device, kernels, reports, programs, recorder)
    if not programs:
        return engine
    try:
        engine(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = f"each call starts all steps anew, as torch cannot be recorded: {str(error).splitlines()[0]}"
        reports = [
            replace(report, note=f"{report.note} ({why})") if step.op == "torch" else report
            for step, report in zip(plan.steps, reports, strict=True)
        ]
        return GpuEngine(plan, device, kernels, reports, programs, is_recorded=False)
    return engine


def open_on_device(
    plan: Plan,
    reports: Sequence[StepReport],
    programs: Sequence[TorchProgram],
    device: torch.device,
    images: int,
) -> GpuEngine:
    """An engine of a plan; its layers are timed where the kernels it names are not all there."""
    device = find_device(device)
    assert plan.input is not None
    size = plan.values[plan.input]
    x = torch.randn(images, size.channels, size.height, size.width, device=device)
    if can_keep(plan, device):
        kernels = {step.name: step.kernel for step in plan.steps if step.layer is not None}
        return build_engine(plan, device, kernels, reports, programs, x)
    notes = {report.name: report.note for report in reports if report.note}
    return choose_kernels(plan, programs, device, x, notes)


def can_keep(plan: Plan, device: torch.device) -> bool:
    """Whether every layer names a kernel of a GPU that takes it on this one."""
    for step in plan.steps:
        if step.layer is None:
            continue
        kind = KERNELS.get(step.kernel)
        if kind is None or kind.why_not(LayerWeights.of_step(plan, step, device)) is not None:
            return False
    return True
