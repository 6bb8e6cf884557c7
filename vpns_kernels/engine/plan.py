"""What is a plan? The steps of a network with their packed weights, and the activations between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._torch import ACTS

Op = Literal["conv2d", "linear", "max_pool", "avg_pool", "adaptive_avg_pool", "add", "copy", "flatten"]
OPS: tuple[Op, ...] = get_args(Op)


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
        geometry: of convolutions and linear layers that of their weight; of pools their window.
        layer: the packed weight of a convolution or linear layer.
        kernel: that runs it; empty where the machine that runs it may choose.
        x, residual, output: indices of values; all None in a plan that holds layers alone.
        counts_padding: a mean divides by the whole window.
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

    def __post_init__(self) -> None:
        if self.op not in OPS or self.act not in ACTS:
            raise ValueError(f"PlanStep: expected op in {OPS}, act in {ACTS}, got {self.op!r}, {self.act!r}")
        found = None if self.layer is None else (self.layer.name, self.layer.op, self.layer.packed.geometry)
        expected = (self.name, self.op, self.geometry) if self.op in ("conv2d", "linear") else None
        if found != expected:
            raise ValueError(f"PlanStep: expected a layer {expected}, got {found}")


@dataclass(frozen=True, eq=False)
class Plan:
    """A network that can be run, or (without values) its layers alone.

    Args:
        chunk: images that a thread takes through all steps at a time.
        is_flat: the output is [N, C], not [N, C, H, W].
    """

    steps: tuple[PlanStep, ...]
    values: tuple[PlanValue, ...] = ()
    input: int | None = None
    output: int | None = None
    chunk: int = 1
    is_flat: bool = False

    def __post_init__(self) -> None:
        counts = Counter(step.name for step in self.steps)
        if doubles := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"plan: expected unique layer names, got {doubles} more than once")

    @property
    def layers(self) -> tuple[PlanLayer, ...]:
        """The layers with weights, in order."""
        return tuple(step.layer for step in self.steps if step.layer is not None)


def plan_of_layers(layers: Sequence[PlanLayer]) -> Plan:
    """Layers alone, as an artifact stores them whose network nobody has compiled."""
    return Plan(tuple(PlanStep(layer.name, layer.op, layer.packed.geometry, layer) for layer in layers))
