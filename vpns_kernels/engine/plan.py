"""What is a plan? The steps of a network with their packed weights, and the activations between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._torch import ACTS

Op = Literal[
    "conv2d", "linear", "max_pool", "avg_pool", "adaptive_avg_pool", "add", "copy", "flatten",
    "gate", "shuffle", "torch",
]  # fmt: skip
OPS: tuple[Op, ...] = get_args(Op)
# Activations that no kernel takes in: they bend.
CURVES = ("silu", "hardswish", "hardsigmoid", "sigmoid", "gelu")
PLAN_ACTS = (*ACTS, *CURVES)
_BY_ROWS: tuple[Op, ...] = ("conv2d", "max_pool", "avg_pool", "add", "copy", "shuffle")


@dataclass(frozen=True)
class PlanValue:
    """An activation [N, C, H, W], channels_last, for any N."""

    channels: int
    height: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PlanStep:
    """One step: output[channels from first_channel on] = act(op(x) + residual).

    Args:
        name: unique; of the layer in the network, where there is one.
        op: a gate multiplies x by its residual, which has x's size or one pixel; a shuffle puts channel
            g * channels / groups + i in place i * groups + g; torch computes what no step does (programs.py).
        geometry: of convolutions and linear layers that of their weight; of pools their window; of shuffles
            their groups.
        layer: the packed weight of a convolution or linear layer.
        kernel: that runs it; empty where the machine that runs it may choose.
        x, residual, output: indices of values; all None in a plan that holds layers alone, and where torch
            reads or writes what no plan holds.
        counts_padding: a mean divides by the whole window.
        read_channel: of a copy, the first channel of x.
        constant: of a convolution of images in a frame, [P, Q, K] of the output's dtype: what to add to
            outputs that see images, and all others as they are.
    """

    name: str
    op: Op
    geometry: ConvGeometry
    layer: PlanLayer | None = None
    kernel: str = ""
    x: int | None = None
    residual: int | None = None
    output: int | None = None
    first_channel: int = 0
    act: str = "none"
    counts_padding: bool = False
    read_channel: int = 0
    constant: Tensor | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS or self.act not in PLAN_ACTS:
            raise ValueError(
                f"PlanStep: expected op in {OPS}, act in {PLAN_ACTS}, got {self.op!r}, {self.act!r}"
            )
        found = None if self.layer is None else (self.layer.name, self.layer.op, self.layer.packed.geometry)
        expected = (self.name, self.op, self.geometry) if self.op in ("conv2d", "linear") else None
        if found != expected:
            raise ValueError(f"PlanStep: expected a layer {expected}, got {found}")

    @property
    def native(self) -> bool:
        """Whether it runs without torch."""
        return self.op != "torch" and (self.layer is None or self.layer.native)


@dataclass(frozen=True, eq=False)
class Plan:
    """A network that can be run, or (without values) its layers alone.

    Args:
        chunk: images that a thread takes through all steps at a time.
        strips: first step and number of steps of each group that takes images one by one, a strip of rows at
            a time through all its steps; in order, apart from one another.
        is_flat: the output is [N, C], not [N, C, H, W].
    """

    steps: tuple[PlanStep, ...]
    values: tuple[PlanValue, ...] = ()
    input: int | None = None
    output: int | None = None
    chunk: int = 1
    is_flat: bool = False
    strips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        counts = Counter(step.name for step in self.steps)
        if doubles := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"plan: expected unique layer names, got {doubles} more than once")
        free = 0
        for first, count in self.strips:
            together = self.steps[first : first + count]
            is_fit = first >= free and len(together) == count >= 2 and all(map(self.runs_by_rows, together))
            if not is_fit:
                raise ValueError(
                    "plan: expected strips of at least two steps that run by rows, apart from one another, "
                    f"got {count} from {first} on"
                )
            free = first + count

    def runs_by_rows(self, step: PlanStep) -> bool:
        """Whether some rows of a step's output can be computed from some rows of what it reads."""
        if step.x is None or step.constant is not None or not step.native:
            return False
        if step.op == "gate":
            assert step.residual is not None
            return self.values[step.residual].height == self.values[step.x].height
        return step.op in _BY_ROWS

    @property
    def layers(self) -> tuple[PlanLayer, ...]:
        """The layers with weights, in order."""
        return tuple(step.layer for step in self.steps if step.layer is not None)

    @property
    def native(self) -> bool:
        """Whether all of it runs without torch."""
        return all(step.native for step in self.steps)


def plan_of_layers(layers: Sequence[PlanLayer]) -> Plan:
    """Layers alone, as an artifact stores them whose network nobody has compiled."""
    return Plan(tuple(PlanStep(layer.name, layer.op, layer.packed.geometry, layer) for layer in layers))
