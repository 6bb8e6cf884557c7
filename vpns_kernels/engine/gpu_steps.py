"""How does torch run the steps of a plan on a device? One after the other, each a call or a few."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vpns_kernels.engine.gpu_clock import measure_ms
from vpns_kernels.engine.gpu_kernels import KERNELS, LayerKernel, first_kernel
from vpns_kernels.engine.gpu_weights import LayerWeights, curve
from vpns_kernels.engine.parts import EnginePart, TorchPart
from vpns_kernels.engine.plan import CURVES, Plan
from vpns_kernels.engine.programs import TorchProgram
from vpns_kernels.ops._torch import finish


class StepPart:
    """One step of a plan.

    Args:
        kernel: that runs a layer; None of a step without weights.
    """

    def __init__(self, plan: Plan, place: int, kernel: str | None, layer: LayerKernel | None) -> None:
        step = plan.steps[place]
        self.step, self.steps = step, range(place, place + 1)
        self.kernels = [kernel or ""]
        assert step.output is not None
        self.reads = [value for value in (step.x, step.residual) if value is not None]
        self.writes = [step.output]
        self._value = plan.values[step.output]
        self._layer = layer
        self._compute = _OPS.get(step.op)
        if layer is None and self._compute is None:
            raise ValueError(f"expected a step that torch runs, got {step.op!r} at {step.name!r}")

    def set_chunk(self, chunk: int) -> None:
        """A GPU takes all images at once."""

    def set_strips(self, strips: Sequence[tuple[int, int]], cache_bytes: int = 0) -> None:
        """A GPU takes all rows at once."""

    def run(self, tensors: dict[int, Tensor], context: Any, threads: int, seconds: Tensor | None) -> None:
        """Read and write values; times are measured elsewhere (gpu_clock.py)."""
        self.run_by(self._layer, tensors)

    def run_by(self, layer: LayerKernel | None, tensors: dict[int, Tensor]) -> None:
        """The same by another kernel."""
        step = self.step
        assert step.x is not None
        assert step.output is not None
        x = self._image(tensors[step.x])
        residual = None if step.residual is None else self._image(tensors[step.residual])
        if layer is not None:
            y = layer(x, residual)
        else:
            assert self._compute is not None
            y = self._compute(self, x, residual)
        value = self._value
        if step.first_channel == 0 and y.shape[1] == value.channels:
            tensors[step.output] = y.to(value.dtype)
            return
        # Several steps write one value, the first channels first.
        if step.first_channel == 0:
            shape = (len(x), value.channels, value.height, value.width)
            tensors[step.output] = torch.empty(
                shape, dtype=value.dtype, device=x.device, memory_format=torch.channels_last
            )
        tensors[step.output][:, step.first_channel : step.first_channel + y.shape[1]].copy_(y)

    def _image(self, tensor: Tensor) -> Tensor:
        """[N, C] of a program as the pixel that it is."""
        return tensor if tensor.dim() == 4 else tensor[:, :, None, None]

    def _max_pool(self, x: Tensor, residual: Tensor | None) -> Tensor:
        g = self.step.geometry
        rounds_up = (self._value.height, self._value.width) != g.output_size(*x.shape[2:])
        return F.max_pool2d(x, g.kernel_size, g.stride, g.padding, ceil_mode=rounds_up)

    def _avg_pool(self, x: Tensor, residual: Tensor | None) -> Tensor:
        g = self.step.geometry
        counts = self.step.counts_padding
        return F.avg_pool2d(x, g.kernel_size, g.stride, g.padding, count_include_pad=counts)

    def _adaptive_avg_pool(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return F.adaptive_avg_pool2d(x, (self._value.height, self._value.width))

    def _add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._act(x if residual is None else x + residual)

    def _gate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        return self._act(x * residual)

    def _act(self, y: Tensor) -> Tensor:
        act = self.step.act
        return curve(y, act) if act in CURVES else finish(y, None, act, y.dtype)

    def _copy(self, x: Tensor, residual: Tensor | None) -> Tensor:
        first = self.step.read_channel
        return x[:, first : first + self.step.geometry.out_channels]

    def _flatten(self, x: Tensor, residual: Tensor | None) -> Tensor:
        # In torch's order, channel by channel.
        return x.reshape(len(x), -1, 1, 1)

    def _shuffle(self, x: Tensor, residual: Tensor | None) -> Tensor:
        groups = self.step.geometry.groups
        shuffled: Tensor = x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
        return shuffled


_OPS: Mapping[str, Callable[[StepPart, Tensor, Tensor | None], Tensor]] = {
    "max_pool": StepPart._max_pool,
    "avg_pool": StepPart._avg_pool,
    "adaptive_avg_pool": StepPart._adaptive_avg_pool,
    "add": StepPart._add,
    "gate": StepPart._gate,
    "copy": StepPart._copy,
    "flatten": StepPart._flatten,
    "shuffle": StepPart._shuffle,
}


def make_device_parts(
    plan: Plan, programs: Sequence[TorchProgram], device: torch.device, kernels: Mapping[str, str]
) -> list[EnginePart]:
    """The steps of a plan, in order.

    Args:
        kernels: of layers, by name; of those that it does not name the first that can.

    Raises:
        ValueError: a kernel that is none or does not take its layer; other steps of torch than programs.
    """
    parts: list[EnginePart] = []
    left = [move_program(program, device) for program in programs]
    place = 0
    while place < len(plan.steps):
        if plan.steps[place].op != "torch":
            parts.append(_make_part(plan, place, device, kernels))
            place += 1
            continue
        if not left:
            raise ValueError(f"expected a program for {plan.steps[place].name}, got none")
        program, begin = left.pop(0), place
        pairs = max(len([p for p in ports if p.value >= 0]) for ports in (program.reads, program.writes))
        place += max(pairs, 1)
        parts.append(TorchPart(program, range(begin, place)))
    if left:
        raise ValueError(f"expected {len(programs) - len(left)} programs, got {len(programs)}")
    return parts


def time_part(part: EnginePart, device: torch.device, tensors: Mapping[int, Tensor]) -> float:
    """Milliseconds of one run; a program of torch that waits for the host is timed without a recording."""

    def work() -> None:
        part.run(dict(tensors), None, 0, None)

    try:
        return measure_ms(work, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not isinstance(part, TorchPart):
            raise
        return measure_ms(work, device, is_recorded=False)


def _make_part(plan: Plan, place: int, device: torch.device, kernels: Mapping[str, str]) -> StepPart:
    step = plan.steps[place]
    if step.layer is None:
        return StepPart(plan, place, None, None)
    weights = LayerWeights.of_step(plan, step, device)
    name = kernels.get(step.name) or first_kernel(weights)
    if name not in KERNELS:
        raise ValueError(f"expected a kernel in {tuple(KERNELS)} for {step.name}, got {name!r}")
    if reason := KERNELS[name].why_not(weights):
        raise ValueError(f"expected a kernel that takes {step.name}, got {name!r}: {reason}")
    return StepPart(plan, place, name, KERNELS[name].make(weights))


def move_program(program: TorchProgram, device: torch.device) -> TorchProgram:
    """A copy whose weights are on another device, and what it makes there too."""
    with warnings.catch_warnings():
        # Of what torch.export keeps beside the operations.
        warnings.simplefilter("ignore")
        module = copy.deepcopy(program.module).to(device)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if "device" in node.kwargs:
                    node.update_kwarg("device", device)
            part.recompile()
    return replace(program, module=module)
