"""What runs a compiled network on a GPU? An engine whose calls are recorded, one graph for each batch size.

The plan is the CPU's: the same steps, weights and file. Each layer runs by cuDNN with everything, or by a
kernel that leaves out what was pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels.engine.engine import Engine
from vpns_kernels.engine.gpu_steps import make_device_parts, time_part
from vpns_kernels.engine.graphs import CudaRecorder, GraphRunner, Recorder
from vpns_kernels.engine.parts import EnginePart
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.programs import TorchProgram
from vpns_kernels.engine.report import StepReport


class GpuEngine(Engine):
    """A compiled network on a device; threads that call it at once take turns.

    Args:
        plan: what it runs.
        device: of weights, images and results.
        kernels: that run layers, by name; of others the first that can.
        reports, programs: as of Engine.
        recorder: of calls; CUDA graphs on a GPU, None elsewhere: there each call starts every step anew.
        is_recorded: False where what is left to torch waits for the host, which no graph can hold.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device | str,
        kernels: Mapping[str, str] | None = None,
        reports: Sequence[StepReport] = (),
        programs: Sequence[TorchProgram] = (),
        recorder: Recorder | None = None,
        is_recorded: bool = True,
    ) -> None:
        self.device = find_device(device)
        self._kernel_of = dict(kernels or {})
        super().__init__(plan, reports, programs=programs)
        assert plan.input is not None
        size = plan.values[plan.input]
        # Channels_last, as all values between steps are.
        self._like = torch.empty(
            (1, size.channels, size.height, size.width), dtype=size.dtype, device=self.device
        )
        self._drops = _find_drops(self._parts, {plan.input, plan.output})
        self._graphs: GraphRunner | None = None
        if recorder is None and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        if recorder is not None and is_recorded:
            self._graphs = GraphRunner(self._compute, self._like, recorder)

    @property
    def parts(self) -> Sequence[EnginePart]:
        """What runs, in order."""
        return self._parts

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes that are recorded, the least recently used first."""
        return [] if self._graphs is None else self._graphs.batch_sizes

    def __reduce__(self) -> tuple[type[Engine], tuple[Any, ...]]:
        made_of = (self.plan, self.device, self._kernel_of, self.reports, self.programs)
        return type(self), (*made_of, None, self._graphs is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """As Engine's; x is on the engine's device."""
        self._check_images(x)
        if self._graphs is None or len(x) == 0:
            return self._compute(self.prepare(x))
        return self._graphs(x.detach())

    def prepare(self, x: Tensor) -> Tensor:
        """Images as the first step reads them."""
        return x.detach().to(self._like.dtype).contiguous(memory_format=torch.channels_last)

    def profile(self, x: Tensor) -> list[float]:
        """Seconds that each step takes, each alone and repeated."""
        tensors = self._run(x, None)
        seconds = [0.0] * len(self.plan.steps)
        with torch.no_grad():
            for part in self._parts:
                seconds[part.steps.start] = time_part(part, self.device, tensors) / 1e3
        return seconds

    def _compute(self, x: Tensor) -> Tensor:
        """All steps; a value's memory is free for others once its last reader is through."""
        assert self.plan.input is not None
        tensors = {self.plan.input: x}
        with torch.no_grad():
            for part, drops in zip(self._parts, self._drops, strict=True):
                part.run(tensors, None, 0, None)
                for value in drops:
                    tensors.pop(value, None)
        return self._result(tensors)

    def _run(self, x: Tensor, seconds: Tensor | None) -> dict[int, Tensor]:
        assert self.plan.input is not None
        self._check_images(x)
        tensors = {self.plan.input: self.prepare(x)}
        with torch.no_grad():
            for part in self._parts:
                part.run(tensors, None, 0, seconds)
        return tensors

    def _make_parts(self, data: Tensor | None) -> list[EnginePart]:
        return make_device_parts(self.plan, self.programs, self.device, self._kernel_of)

    def _describe_workers(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} ({self.device})"
        return f"torch on the {self.device}"


def find_device(device: torch.device | str) -> torch.device:
    """The device with its number, as tensors on it name it; RuntimeError where torch has no such device."""
    return torch.empty(0, device=device).device


def _find_drops(parts: Sequence[EnginePart], kept: set[int | None]) -> list[list[int]]:
    """Values that nobody reads after each part."""
    seen: set[int] = set()
    found: list[list[int]] = []
    for part in reversed(parts):
        last = {*part.reads, *part.writes} - seen - kept
        # What later steps write on stays.
        found.append(sorted(last))
        seen |= {*part.reads, *part.writes}
    return found[::-1]
