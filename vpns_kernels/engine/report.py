"""I pruned it: why is it not faster? What each step of a compiled network costs, and why it runs so."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine.plan import Plan, PlanStep
from vpns_kernels.text_table import align


@dataclass(frozen=True)
class StepReport:
    """What compiling measured of a step, per image.

    Args:
        sparse_ms: without what was pruned; None where nothing was.
        dense_ms: with everything; None of a step without weights.
        ms: of what was chosen.
        kernel: that runs it; empty without weights.
        note: why torch runs it; empty of a native step.
        others: kernels that would leave out what was pruned and do not take the step, each with its reason.
        pattern, density: of what pruning has left, whichever way it runs; empty and None where nothing was.
        is_sparse: whether what was pruned is left out, as it was chosen.
    """

    name: str
    sparse_ms: float | None
    dense_ms: float | None
    ms: float
    kernel: str
    note: str = ""
    others: str = ""
    pattern: str = ""
    density: float | None = None
    is_sparse: bool = False

    @property
    def reason(self) -> str:
        """Why the step runs as it does, in words."""
        return f"{self._why()}; {self.others}" if self.others else self._why()

    def _why(self) -> str:
        if self.note:
            return f"left to torch: {self.note}"
        if self.dense_ms is None:
            return "no weights"
        if self.sparse_ms is None:
            is_native = self.kernel.startswith("channel")
            return (
                f"nothing is pruned: dense, natively by {self.kernel}" if is_native else "nothing is pruned"
            )
        if self.is_sparse:
            ratio = self.dense_ms / self.sparse_ms
            return f"{ratio:.1f}x faster than dense ({self.sparse_ms:.4f} against {self.dense_ms:.4f} ms)"
        return f"dense is faster here ({self.dense_ms:.4f} against {self.sparse_ms:.4f} ms)"


@dataclass(frozen=True)
class EngineReport:
    """All steps of an engine; as a string, a table for people.

    Args:
        workers: what runs them: threads, and how many images each takes at a time, or a GPU.
    """

    plan: Plan
    steps: tuple[StepReport, ...]
    workers: str
    notes: tuple[str, ...] = ()

    @property
    def sparse_flops_share(self) -> float:
        """Share in [0, 1] of the dense network's multiplications that stand in layers which run sparsely."""
        flops = [_flops(self.plan, step) for step in self.plan.steps]
        ran = sum(f for f, report in zip(flops, self.steps, strict=True) if report.is_sparse)
        return ran / max(sum(flops), 1)

    def rows(self) -> list[dict[str, Any]]:
        """One row per step: name, op, shape, pattern, density, ms per image, kernel, reason and share."""
        total = sum(report.ms for report in self.steps)
        rows = []
        for step, report in zip(self.plan.steps, self.steps, strict=True):
            layer = step.layer
            rows.append(
                {
                    "op": step.op,
                    "shape": _shape(self.plan, step),
                    **asdict(report),
                    "density": 1.0 if layer is not None and report.density is None else report.density,
                    "share": report.ms / total if total else 0.0,
                    "reason": report.reason,
                }
            )
        return rows

    def __str__(self) -> str:
        head = ("step", "shape", "pattern", "density", "dense ms", "sparse ms", "kernel", "share", "why")
        table = [head]
        for row in self.rows():
            density = "" if row["density"] is None else f"{row['density']:.3f}"
            times = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("dense_ms", "sparse_ms")]
            share = f"{row['share']:.1%}"
            table.append(
                (
                    row["name"],
                    row["shape"],
                    row["pattern"],
                    density,
                    *times,
                    row["kernel"] or row["op"],
                    share,
                    row["reason"],
                )
            )
        total = sum(report.ms for report in self.steps)
        lines = [
            f"{len(self.steps)} steps, {_dtype(self.plan)}, {self.workers}; {total:.3f} ms per image, "
            f"{self.sparse_flops_share:.0%} of the dense multiplications in layers that run sparsely",
            *self.notes,
            *align(table),
        ]
        return "\n".join(lines)


def describe_pruning(step: PlanStep) -> dict[str, Any]:
    """Pattern and density, as of a report, of a step that is packed without what was pruned."""
    packed = None if step.layer is None else step.layer.packed
    if packed is None or packed.density == 1:
        return {}
    return {"pattern": packed.pattern.spec, "density": packed.density}


def _shape(plan: Plan, step: PlanStep) -> str:
    if step.x is None:
        return ""
    x = plan.values[step.x]
    if step.op not in ("conv2d", "linear"):
        return f"{x.channels} @{x.height}x{x.width}"
    return step.geometry.describe(None if step.op == "linear" else (x.height, x.width))


def _flops(plan: Plan, step: PlanStep) -> int:
    if step.layer is None or step.x is None:
        return 0
    x = plan.values[step.x]
    return step.geometry.flops(1, x.height, x.width)


def _dtype(plan: Plan) -> str:
    assert plan.input is not None
    return dtype_name(plan.values[plan.input].dtype)
