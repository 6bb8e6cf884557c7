"""What runs a compiled network? An Engine: images in, results out, with no Python between native layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.engine.artifact import write_artifact
from vpns_kernels.engine.parts import EnginePart, NativePart, make_parts
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.plan_file import encode_plan
from vpns_kernels.engine.programs import (
    TorchProgram,
    describe_program,
    export_program,
)
from vpns_kernels.engine.report import EngineReport, StepReport

# With one image, torch.export would take the batch size for a constant.
_EXPORT_IMAGES = 3


class Engine:
    """A compiled network on the CPU (on a GPU: gpu.py); any number of threads may call it at once.

    Args:
        plan: what it runs.
        reports: what compiling measured of each step.
        data: the plan's bytes, uint8; encoded by default.
        threads: of a call; torch's own number by default, asked at each call. What is left to torch always
            runs with torch's own.
        programs: what is left to torch.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        plan: Plan,
        reports: Sequence[StepReport] = (),
        data: Tensor | None = None,
        threads: int | None = None,
        programs: Sequence[TorchProgram] = (),
    ) -> None:
        self.plan, self.reports, self.threads = plan, tuple(reports), threads
        self.programs = tuple(programs)
        self._parts = self._make_parts(data)
        self._lock = Lock()
        self._idle: list[Any] = []  # contexts that no call uses

    @property
    def kernels(self) -> list[str]:
        """What runs each step on this machine; empty where a step has no weights."""
        return [kernel for part in self._parts for kernel in part.kernels]

    def __call__(self, x: Tensor) -> Tensor:
        """Run images of the size that was compiled.

        Args:
            x: float32, bfloat16 or float16 [N, C, H, W], in any memory format, any N.

        Returns:
            float32 [N, classes], or [N, K, P, Q] channels_last of a network that ends in an activation.

        Raises:
            TypeError, ValueError: another dtype, device or size.
        """
        return self._result(self._run(x, None))

    def explain(self, quiet: bool = False) -> EngineReport:
        """Print and return what each step costs, as compiling measured it, and why it runs as it does.

        Raises:
            ValueError: an engine made of a plan that nobody has measured.
        """
        if not self.reports:
            raise ValueError("explain: expected an engine that compile has measured, got one of a bare plan")
        notes = []
        for report, kernel in zip(self.reports, self.kernels, strict=True):
            if report.kernel != kernel:
                notes.append(
                    f"{report.name}: compiled for {report.kernel}, which this CPU lacks; {kernel} runs it"
                )
        for first, count, rows in self.strips:
            names = self.plan.steps[first].name, self.plan.steps[first + count - 1].name
            notes.append(f"{names[0]} to {names[1]} run together, {rows} row{'s' * (rows > 1)} at a time")
        found = EngineReport(self.plan, self.reports, self._describe_workers(), tuple(notes))
        if not quiet:
            print(found)
        return found

    def save(self, folder: Path | str) -> None:
        """Write the engine as an artifact, whole or not at all; an artifact that stands there is replaced.

        Raises:
            ArtifactError: what stands at `folder` is no artifact.
            OSError: it cannot be written.
        """
        save_engine(self, Path(folder))

    def profile(self, x: Tensor) -> list[float]:
        """Seconds that one call spends in each step, averaged over its threads."""
        seconds = torch.zeros(len(self.plan.steps), dtype=torch.float64)
        self._run(x, seconds)
        return seconds.tolist()

    def set_chunk(self, chunk: int) -> None:
        """Let each thread take as many images at a time; for compiling, while nobody calls."""
        for part in self._parts:
            part.set_chunk(chunk)

    def set_strips(self, strips: Sequence[tuple[int, int]], cache_bytes: int = 0) -> None:
        """Let other groups of steps run by strips, as Plan has them; for compiling, while nobody calls.

        Args:
            cache_bytes: what the rows that a strip touches should fit; 0: a core's second-level cache.
        """
        for part in self._parts:
            part.set_strips(strips, cache_bytes)

    @property
    def strips(self) -> list[tuple[int, int, int]]:
        """The groups that run by strips here, each as (first step, number of steps, rows at a time)."""
        return [group for part in self._parts if isinstance(part, NativePart) for group in part.strips]

    def store_programs(self) -> list[bytes]:
        """What is left to torch, as torch.export stores it; ValueError where it cannot."""
        assert self.plan.input is not None
        size = self.plan.values[self.plan.input]
        images = torch.randn(_EXPORT_IMAGES, size.channels, size.height, size.width, device=self.device)
        one, more = self._run(images[:1], None), self._run(images, None)
        stored = []
        for program in self.programs:
            example, other = ([port.fit(t[port.value].cpu()) for port in program.reads] for t in (more, one))
            stored.append(export_program(program, example, other))
        return stored

    def __reduce__(self) -> tuple[type[Engine], tuple[Any, ...]]:
        return type(self), (self.plan, self.reports, None, self.threads, self.programs)

    def _result(self, tensors: dict[int, Tensor]) -> Tensor:
        assert self.plan.output is not None
        y, size = tensors[self.plan.output], self.plan.values[self.plan.output]
        y = y.float()
        return y.reshape(len(y), size.channels) if self.plan.is_flat else y

    def _run(self, x: Tensor, seconds: Tensor | None) -> dict[int, Tensor]:
        """All values that parts have left, by their index."""
        assert self.plan.input is not None
        self._check_images(x)
        tensors = {self.plan.input: x.detach()}
        threads = self.threads or torch.get_num_threads()
        context = self._borrow()
        try:
            for part in self._parts:
                part.run(tensors, context, threads, seconds)
        finally:
            with self._lock:
                self._idle.append(context)
        return tensors

    def _make_parts(self, data: Tensor | None) -> list[EnginePart]:
        # It must outlive the parts.
        self._data = _encode(self.plan) if data is None else data
        return make_parts(self.plan, self._data, self.programs)

    def _describe_workers(self) -> str:
        threads, chunk = self.threads or torch.get_num_threads(), self.plan.chunk
        return f"{threads} threads, {chunk} image{'s' if chunk > 1 else ''} at a time"

    def _check_images(self, x: Tensor) -> None:
        assert self.plan.input is not None
        sizes = self.plan.values[self.plan.input]
        if not isinstance(x, Tensor) or x.dtype not in DTYPE_NAMES or x.dtype == torch.float64:
            raise TypeError(
                f"Engine: expected float32, bfloat16 or float16, got {getattr(x, 'dtype', type(x))}"
            )
        if x.device != self.device:
            where = "the CPU" if self.device.type == "cpu" else self.device
            raise TypeError(f"Engine: expected a tensor on {where}, got one on {x.device}")
        expected = (sizes.channels, sizes.height, sizes.width)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"Engine: expected x [N, {', '.join(map(str, expected))}], got {list(x.shape)}")

    def _borrow(self) -> Any:
        with self._lock:
            return self._idle.pop() if self._idle else native.library().ExecutionContext()


def check_threads(who: str, threads: int | None) -> None:
    """Refuse what is no number of threads."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"{who}: expected threads as a whole number or None, got {threads!r}")
    if threads < 1:
        raise ValueError(f"{who}: expected at least 1 thread, got {threads}")


def save_engine(
    engine: Engine,
    folder: Path,
    fields: Mapping[str, Any] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    prompt: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an engine as an artifact, with more about it.

    Args:
        fields: of the manifest, JSON values; not `kind`, `reports` and `programs`.
        masks, weights, prompt: as write_artifact takes them.

    Raises:
        ArtifactError, OSError: as write_artifact.
        ValueError: torch.export cannot store what is left to torch.
    """
    own = {
        "kind": "engine",
        "reports": [asdict(report) for report in engine.reports],
        "programs": [describe_program(program) for program in engine.programs],
    }
    if taken := own.keys() & dict(fields or {}).keys():
        raise ValueError(f"save_engine: expected fields without {sorted(own)}, got {sorted(taken)}")
    stored = engine.store_programs() if engine.programs else []
    write_artifact(folder, {**(fields or {}), **own}, engine.plan, masks or {}, weights, stored, prompt)


def _encode(plan: Plan) -> Tensor:
    # In pieces: the data of a large network should not be there three times.
    pieces = [
        torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in encode_plan(plan) if len(piece)
    ]
    return torch.cat(pieces)
