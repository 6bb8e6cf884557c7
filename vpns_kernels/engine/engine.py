"""What runs a compiled network? An Engine: images in, results out, with no Python between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.engine.artifact import read_artifact, write_artifact
from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.plan_file import encode_plan
from vpns_kernels.engine.report import EngineReport, StepReport
from vpns_kernels.ops._cpu.prepared import DTYPE_NAMES


class Engine:
    """A compiled network; any number of threads may call it at once.

    Args:
        plan: what it runs.
        reports: what compiling measured of each step.
        data: the plan's bytes, uint8; encoded by default.
        threads: of a call; torch's own number by default, asked at each call.
    """

    def __init__(
        self,
        plan: Plan,
        reports: Sequence[StepReport] = (),
        data: Tensor | None = None,
        threads: int | None = None,
    ) -> None:
        self.plan, self.reports, self.threads = plan, tuple(reports), threads
        self._data = _encode(plan) if data is None else data
        self._network = native.library().Network(self._data.data_ptr(), self._data.numel())
        self._lock = Lock()
        self._idle: list[Any] = []  # contexts that no call uses

    @property
    def kernels(self) -> list[str]:
        """What runs each step on this machine; empty where a step has no weights."""
        names: list[str] = self._network.kernels
        return names

    def __call__(self, x: Tensor) -> Tensor:
        """Run images of the size that was compiled.

        Args:
            x: float32, bfloat16 or float16 [N, C, H, W], in any memory format, any N.

        Returns:
            float32 [N, classes], or [N, K, P, Q] channels_last of a network that ends in an activation.

        Raises:
            TypeError, ValueError: another dtype, device or size.
        """
        return self._run(x, 0)

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
                    f"{report.name}: compiled for {report.kernel}, which this CPU has not; {kernel} runs it"
                )
        found = EngineReport(self.plan, self.reports, self.threads or torch.get_num_threads(), tuple(notes))
        if not quiet:
            print(found)
        return found

    def save(self, folder: Path | str) -> None:
        """Write the engine as an artifact, whole or not at all; an artifact that stands there is replaced.

        Raises:
            ArtifactError: what stands at `folder` is no artifact.
            OSError: it cannot be written.
        """
        reports = [asdict(report) for report in self.reports]
        write_artifact(Path(folder), {"kind": "engine", "reports": reports}, self.plan, {})

    def profile(self, x: Tensor) -> list[float]:
        """Seconds that one call spends in each step, averaged over its threads."""
        seconds = torch.zeros(len(self.plan.steps), dtype=torch.float64)
        self._run(x, seconds.data_ptr())
        return seconds.tolist()

    def _run(self, x: Tensor, seconds: int) -> Tensor:
        assert self.plan.input is not None
        assert self.plan.output is not None
        sizes, out = self.plan.values[self.plan.input], self.plan.values[self.plan.output]
        if not isinstance(x, Tensor) or x.dtype not in DTYPE_NAMES or x.dtype == torch.float64:
            raise TypeError(
                f"Engine: expected float32, bfloat16 or float16, got {getattr(x, 'dtype', type(x))}"
            )
        if x.device.type != "cpu":
            raise TypeError(f"Engine: expected a tensor on the CPU, got one on {x.device}")
        expected = (sizes.channels, sizes.height, sizes.width)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"Engine: expected x [N, {', '.join(map(str, expected))}], got {list(x.shape)}")
        x = x.detach()
        images = len(x)
        y = torch.empty(
            (images, out.channels, out.height, out.width),
            dtype=torch.float32,
            memory_format=torch.channels_last,
        )
        context = self._borrow()
        try:
            self._network.run(
                context, x.data_ptr(), DTYPE_NAMES[x.dtype], list(x.stride()), y.data_ptr(), "float32",
                list(y.stride()), images, self.threads or torch.get_num_threads(), seconds,
            )  # fmt: skip
        finally:
            with self._lock:
                self._idle.append(context)
        return y.flatten(1) if self.plan.is_flat else y

    def _borrow(self) -> Any:
        with self._lock:
            return self._idle.pop() if self._idle else native.library().ExecutionContext()


def load(folder: Path | str, threads: int | None = None) -> Engine:
    """Open an engine that `save` wrote; on a weaker CPU other kernels run it, and `explain()` says so.

    Args:
        threads: of each call; torch's number by default.

    Raises:
        ArtifactError: names the file and what is wrong with it; also where it holds layers but no network.
    """
    artifact = read_artifact(Path(folder))
    if artifact.plan.input is None:
        raise ArtifactError(
            f"load: expected a compiled network in {folder}, got its layers alone "
            "(compile the network and save it)"
        )
    try:
        reports = [StepReport(**fields) for fields in artifact.manifest["reports"]]
        return Engine(artifact.plan, reports, artifact.plan_bytes, threads)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"load: expected an engine in {folder}, got: {error}") from error


def _encode(plan: Plan) -> Tensor:
    # In pieces: the data of a large network should not be there three times.
    pieces = [
        torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in encode_plan(plan) if len(piece)
    ]
    return torch.cat(pieces)
