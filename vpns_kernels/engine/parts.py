"""What runs in turn when an engine is called? Native steps in one go, and between them programs of torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.programs import TorchProgram


class EnginePart(Protocol):
    """Some steps of a plan.

    Attributes:
        steps: their places in the plan.
        kernels: what runs each; empty where a step has no weights.
        reads, writes: values; below 0 those of torch alone.
    """

    steps: range
    kernels: list[str]
    reads: list[int]
    writes: list[int]

    def set_chunk(self, chunk: int) -> None:
        """Images that a thread takes at a time."""

    def set_strips(self, strips: Sequence[tuple[int, int]], cache_bytes: int = 0) -> None:
        """Which of the plan's steps run by strips, as Engine.set_strips takes them."""

    def run(self, tensors: dict[int, Tensor], context: Any, threads: int, seconds: Tensor | None) -> None:
        """Read and write tensors of a call, by their value; add the time of each step of the plan."""


class NativePart:
    """Native steps between two of torch's, or all.

    Args:
        data: the plan's bytes; they must outlive the part.
        segment: which, counted from 0; -1: the whole plan.
        programs: of the engine.
    """

    def __init__(
        self, plan: Plan, data: Tensor, steps: range, segment: int, programs: Sequence[TorchProgram]
    ) -> None:
        self.steps, self._plan, self._data = steps, plan, data
        self._network = native.library().Network(data.data_ptr(), data.numel(), segment)
        self.kernels: list[str] = self._network.kernels
        # As who reads them expects them: otherwise they would be copied once more.
        ports = {port.value: port for program in programs for port in program.reads}
        self._outputs = [(value, ports.get(value)) for value in self._network.outputs]
        self.reads: list[int] = self._network.inputs
        self.writes: list[int] = self._network.outputs

    def set_chunk(self, chunk: int) -> None:
        self._network.set_chunk(chunk)

    def set_strips(self, strips: Sequence[tuple[int, int]], cache_bytes: int = 0) -> None:
        own = self.steps.start
        groups = [(first - own, count) for first, count in strips if first in self.steps]
        self._network.set_strips(groups, cache_bytes)

    @property
    def strips(self) -> list[tuple[int, int, int]]:
        """The groups of these steps that run by strips, as Engine.strips has them."""
        return [(self.steps.start + first, count, rows) for first, count, rows in self._network.strips]

    def run(self, tensors: dict[int, Tensor], context: Any, threads: int, seconds: Tensor | None) -> None:
        values = self._plan.values
        x = []
        for value in self.reads:
            size = values[value]
            x.append(tensors[value].reshape(-1, size.channels, size.height, size.width))
        images = len(x[0])
        for value, port in self._outputs:
            size = values[value]
            shape = (images, size.channels, size.height, size.width)
            strides = () if port is None else port.strides
            is_planar = len(strides) == 4 and strides[1] >= size.height * size.width
            layout = torch.contiguous_format if is_planar else torch.channels_last
            dtype = torch.float32 if port is None else getattr(torch, port.dtype)
            tensors[value] = torch.empty(shape, dtype=dtype, memory_format=layout)
        y = [tensors[value] for value, _ in self._outputs]
        clock = 0 if seconds is None else seconds.data_ptr() + 8 * self.steps.start
        self._network.run(context, [_refer(t) for t in x], [_refer(t) for t in y], images, threads, clock)


class TorchPart:
    """A program of torch."""

    def __init__(self, program: TorchProgram, steps: range) -> None:
        self.steps, self.program = steps, program
        self.kernels = ["torch"] * len(steps)
        self.reads = [port.value for port in program.reads]
        self.writes = [port.value for port in program.writes]

    def set_chunk(self, chunk: int) -> None:
        """torch takes all at once."""

    def set_strips(self, strips: Sequence[tuple[int, int]], cache_bytes: int = 0) -> None:
        """torch takes all at once."""

    def run(self, tensors: dict[int, Tensor], context: Any, threads: int, seconds: Tensor | None) -> None:
        started = time.perf_counter()
        self.program.run(tensors)
        if seconds is not None:
            seconds[self.steps.start] += time.perf_counter() - started


def make_parts(plan: Plan, data: Tensor, programs: Sequence[TorchProgram]) -> list[EnginePart]:
    """The parts of a plan, in order; ValueError where its steps of torch are not the programs."""
    if plan.native:
        if programs:
            raise ValueError(f"expected no program of a plan without torch, got {len(programs)}")
        return [NativePart(plan, data, range(len(plan.steps)), -1, ())]
    parts: list[EnginePart] = []
    begin, segments, left = 0, 0, list(programs)
    while begin < len(plan.steps):
        is_native = plan.steps[begin].native
        end = begin
        while end < len(plan.steps) and plan.steps[end].native == is_native:
            end += 1
        if is_native:
            parts.append(NativePart(plan, data, range(begin, end), segments, programs))
            segments += 1
        elif left:
            parts.append(TorchPart(left.pop(0), range(begin, end)))
        else:
            raise ValueError(f"expected a program for {plan.steps[begin].name}, got none")
        begin = end
    if left:
        raise ValueError(f"expected {len(programs) - len(left)} programs, got {len(programs)}")
    _check_order(plan, parts)
    return parts


def _check_order(plan: Plan, parts: Sequence[EnginePart]) -> None:
    """ValueError where a part reads what no part before it writes."""
    there = {plan.input}
    for part in parts:
        if missing := set(part.reads) - there:
            raise ValueError(f"expected values that were computed before, got {sorted(missing)}")
        there.update(part.writes)
    if plan.output not in there:
        raise ValueError(f"expected an output that is computed, got {plan.output}")


def _refer(tensor: Tensor) -> tuple[int, str, list[int]]:
    """As the native library takes a tensor."""
    return tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], list(tensor.stride())
