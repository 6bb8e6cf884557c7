"""What is a step before its weights are packed, and how do the steps of a traced network come together?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx

from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.engine.plan import Op
from vpns_kernels.engine.programs import TorchProgram
from vpns_kernels.engine.trace import Traced, is_computed, place_of
from vpns_kernels.geometry import ConvGeometry

# Weights that are drawn are exactly 0 now and then; to leave out so few gains nothing.
_CHANCE = 0.99


class LoweringError(NotImplementedError):
    """An operation that no step computes; the message names it and its place."""


@dataclass(eq=False)
class Draft:
    """A step before its weights are packed.

    Args:
        layer: name of the layer in the network that its weights come from; of an operation without weights
            the operation's own.
        x, residual, output: indices of activations; of a step of torch perhaps none.
        weight: float64 [K, C / groups, R, S]; None of a step without weights.
        kept: bool, as weight: what was not pruned.
        constant: float64 [K, P, Q], added to every image; where no image is seen it is all there is.
        segment: steps of others are not changed by later ones.
        layers: its weights packed, by dtype and whether what was pruned is left out.
    """

    op: Op
    layer: str
    geometry: ConvGeometry
    x: int | None
    output: int | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    kept: Tensor | None = None
    residual: int | None = None
    act: str = "none"
    first_channel: int = 0
    counts_padding: bool = False
    read_channel: int = 0
    constant: Tensor | None = None
    segment: int = 0
    layers: dict[tuple[torch.dtype, bool], PlanLayer] = field(default_factory=dict)

    @property
    def takes_residual(self) -> bool:
        """Whether a residual can be added before its activation."""
        return self.weight is not None and self.residual is None and self.constant is None


@dataclass(eq=False)
class Lowered:
    """All steps of a network, the sizes [C, H, W] of its activations, and what torch runs."""

    steps: list[Draft] = field(default_factory=list)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    input: int = 0
    output: int = 0
    is_flat: bool = False
    programs: list[TorchProgram] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Framed:
    """An activation that is another one, each channel scaled, in a frame, with a constant added.

    Args:
        source: that other one.
        pads: rows above and columns left of it.
        scale: float64 [C].
        shift: float64 [C, height, width], of the whole.
    """

    source: fx.Node
    pads: tuple[int, int]
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Channels of an activation that the next operation takes, or lays in another order.

    Args:
        kind: "pieces" of `size` channels each, some `channels`, "groups" as an axis of their own, or
            "members", the same with the axes exchanged.
    """

    kind: Literal["pieces", "channels", "groups", "members"]
    source: fx.Node
    first: int = 0
    size: int = 0


class Lowering:
    """Collects the steps of a traced network; its operations come in order, segment by segment."""

    def __init__(self, traced: Traced) -> None:
        self.found = Lowered()
        self.segment = 0
        # Nodes that are part of what reads them.
        self.virtual: dict[fx.Node, Framed | Part] = {}
        self._traced = traced
        self._values: dict[fx.Node, int] = {}
        self._sides: dict[fx.Node, int] = {}
        self._made_by: dict[int, Draft] = {}
        # Nodes that are nothing but another node's output.
        self._other_name_of: dict[fx.Node, fx.Node] = {}

    def add_input(self, node: fx.Node) -> None:
        """A placeholder: the images, or a weight."""
        if node.name not in self._traced.tensors:
            self.found.input = self._values[node] = self.add_value(node)

    def set_output(self, node: fx.Node) -> None:
        """What the network returns."""
        results: Any = node.args[0]
        if len(results) != 1 or results[0] not in self._values:
            raise LoweringError(
                f"compile: expected a network that returns one tensor [N, C] or [N, C, H, W], got {results}"
            )
        self.found.output = self._values[results[0]]
        self.found.is_flat = results[0].meta["val"].dim() == 2

    def refuse(self, node: fx.Node, reason: str) -> NoReturn:
        """LoweringError, with the operation and the module that it stands in."""
        raise LoweringError(f"{node.target} at {place_of(node)!r}: {reason}")

    def add_value(self, node: fx.Node) -> int:
        """A new activation of a node's size."""
        if not self._traced.is_activation(node):
            self.refuse(node, f"expected an activation [N, C, H, W] or [N, C], got {_shape(node)}")
        shape = list(node.meta["val"].shape)[1:]
        self.found.sizes.append((shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1))
        return len(self.found.sizes) - 1

    def value_of(self, node: fx.Node, argument: Any) -> int:
        """The activation that an argument of a node is."""
        if argument not in self._values:
            self.refuse(node, f"expected an activation, got {argument}")
        return self._values[argument]

    @property
    def device(self) -> torch.device:
        """The device of the weights; "meta" where only sizes are wanted."""
        return self._traced.device

    def has_value(self, argument: Any) -> bool:
        """Whether an argument of a node is an activation that is stored."""
        return argument in self._values

    def size_of(self, value: int) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.found.sizes[value]

    def tensor_of(self, node: fx.Node, argument: Any) -> Tensor:
        """The weight, or the number, that an argument of a node is, in float64."""
        if isinstance(argument, int | float):
            return torch.tensor(argument, dtype=torch.float64, device=self.device)
        if not isinstance(argument, fx.Node) or argument.name not in self._traced.tensors:
            self.refuse(node, f"expected a weight of the network, got {argument}")
        found = self._traced.tensors[argument.name]
        if found.is_complex():
            self.refuse(node, f"expected real numbers, got {found.dtype} in {argument.name}")
        return found.double()

    def layer_of(self, argument: fx.Node) -> str:
        """The name of the module whose weight an argument is."""
        return self._traced.names[argument.name].rpartition(".")[0]

    def kept_of(self, layer: str, weight: Tensor) -> Tensor:
        """What was not pruned of a layer's weight: by its mask, or by its zeros, where they are no chance."""
        mask = self._traced.masks.get(layer)
        if mask is not None:
            return mask.view_as(weight)
        kept = weight != 0
        is_by_chance = not kept.is_meta and int(kept.sum()) > _CHANCE * kept.numel()
        return torch.ones_like(kept) if is_by_chance else kept

    def add_step(self, node: fx.Node, draft: Draft) -> None:
        """A step that computes a node."""
        assert draft.output is not None
        draft.segment = self.segment
        self.found.steps.append(draft)
        self._values[node] = draft.output
        self._made_by[draft.output] = draft

    def join(self, node: fx.Node, draft: Draft) -> None:
        """A node that a step before computes as well."""
        assert draft.output is not None
        self._values[node] = draft.output

    def add_side(self, node: fx.Node) -> None:
        """A result of torch that no native step could read; counted down from -1."""
        self._sides[node] = -1 - len(self._sides)

    def find_value(self, node: fx.Node) -> int:
        """The activation that a node is; below 0 of one that is torch's alone."""
        return self._sides[node] if node in self._sides else self.value_of(node, node)

    def set_step(self, node: fx.Node, draft: Draft) -> None:
        """A node that a step before computes now, instead of what it did."""
        assert draft.output is not None
        self._values[node] = draft.output
        self._made_by[draft.output] = draft

    def name_again(self, node: fx.Node, source: Any) -> None:
        """A node that is nothing but another."""
        self._values[node] = self.value_of(node, source)
        self._other_name_of[node] = source

    def set_value(self, node: fx.Node, value: int) -> None:
        """A node that several steps, or torch, compute together."""
        self._values[node] = value

    def open_step(self, node: fx.Node, argument: fx.Node) -> Draft | None:
        """The step that made an input of a node and can take the node in; None where others read it."""
        made = self._made_by.get(self._values[argument])
        if made is None or made.act != "none" or made.segment != self.segment:
            return None
        reader = node
        while True:
            if [user for user in argument.users if is_computed(user)] != [reader]:
                return None
            if argument not in self._other_name_of:
                return made
            reader, argument = argument, self._other_name_of[argument]

    def place_of(self, value: int) -> int:
        """Which step computes an activation; -1 of the images and of what several steps compute."""
        made = self._made_by.get(value)
        return -1 if made is None else self.found.steps.index(made)


def _shape(node: fx.Node) -> object:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else value
