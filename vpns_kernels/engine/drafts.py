"""What is a step before its weights are packed, and how do the steps of a traced network come together?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, fx

from vpns_kernels.engine.plan import Op
from vpns_kernels.engine.trace import Traced
from vpns_kernels.geometry import ConvGeometry


class LoweringError(NotImplementedError):
    """An operation that no step computes; the message names it and its place."""


@dataclass(eq=False)
class Draft:
    """A step before its weights are packed.

    Args:
        layer: name of the layer in the network that its weights come from; of an operation without weights
            the operation's own.
        x, residual, output: indices of activations.
        weight: float64 [K, C / groups, R, S]; None of a step without weights.
        kept: bool, as weight: what was not pruned.
    """

    op: Op
    layer: str
    geometry: ConvGeometry
    x: int
    output: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    kept: Tensor | None = None
    residual: int | None = None
    act: str = "none"
    first_channel: int = 0
    counts_padding: bool = False


@dataclass(eq=False)
class Lowered:
    """All steps of a network, and the sizes [C, H, W] of its activations."""

    steps: list[Draft] = field(default_factory=list)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    input: int = 0
    output: int = 0
    is_flat: bool = False


class Lowering:
    """Collects the steps of a traced network; its operations come in order."""

    def __init__(self, traced: Traced) -> None:
        self.found = Lowered()
        self._traced = traced
        self._values: dict[fx.Node, int] = {}
        self._made_by: dict[int, Draft] = {}
        # Nodes that are nothing but another node's output.
        self._other_name_of: dict[fx.Node, fx.Node] = {}

    def add_input(self, node: fx.Node) -> None:
        """A placeholder: the images, or a weight."""
        if node.name not in self._traced.names:
            self.found.input = self._values[node] = self.add_value(node)

    def set_output(self, node: fx.Node) -> None:
        """What the network returns."""
        results: Any = node.args[0]
        if len(results) != 1 or results[0] not in self._values:
            raise LoweringError(f"output: expected one activation, got {results}")
        self.found.output = self._values[results[0]]
        self.found.is_flat = results[0].meta["val"].dim() == 2

    def refuse(self, node: fx.Node, reason: str) -> NoReturn:
        """LoweringError, with the operation and the module that it stands in."""
        stack = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        place = next((name for name in reversed(stack) if name), node.name)
        raise LoweringError(f"{node.target} at {place!r}: {reason}")

    def add_value(self, node: fx.Node) -> int:
        """A new activation of a node's size."""
        shape = list(node.meta["val"].shape)[1:]
        if len(shape) not in (1, 3) or any(not isinstance(extent, int) for extent in shape):
            self.refuse(node, f"expected an activation [N, C, H, W] or [N, C], got {node.meta['val'].shape}")
        self.found.sizes.append((shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1))
        return len(self.found.sizes) - 1

    def value_of(self, node: fx.Node, argument: Any) -> int:
        """The activation that an argument of a node is."""
        if argument not in self._values:
            self.refuse(node, f"expected an activation, got {argument}")
        return self._values[argument]

    def size_of(self, value: int) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.found.sizes[value]

    def tensor_of(self, node: fx.Node, argument: Any) -> Tensor:
        """The weight that an argument of a node is, in float64."""
        if not isinstance(argument, fx.Node) or argument.name not in self._traced.tensors:
            self.refuse(node, f"expected a weight of the network, got {argument}")
        return self._traced.tensors[argument.name].double()

    def layer_of(self, argument: fx.Node) -> str:
        """The name of the module whose weight an argument is."""
        return self._traced.names[argument.name].rpartition(".")[0]

    def kept_of(self, layer: str, weight: Tensor) -> Tensor:
        """What was not pruned of a layer's weight: by its mask, or by its zeros."""
        mask = self._traced.masks.get(layer)
        return weight != 0 if mask is None else mask.view_as(weight)

    def add_step(self, node: fx.Node, draft: Draft) -> None:
        """A step that computes a node."""
        self.found.steps.append(draft)
        self._values[node] = draft.output
        self._made_by[draft.output] = draft

    def join(self, node: fx.Node, draft: Draft) -> None:
        """A node that a step before computes as well."""
        self._values[node] = draft.output

    def name_again(self, node: fx.Node, source: Any) -> None:
        """A node that is nothing but another."""
        self._values[node] = self.value_of(node, source)
        self._other_name_of[node] = source

    def set_value(self, node: fx.Node, value: int) -> None:
        """A node that several steps compute together."""
        self._values[node] = value

    def open_step(self, node: fx.Node, argument: fx.Node) -> Draft | None:
        """The step that made an input of a node and can take the node in; None where others read it."""
        made = self._made_by.get(self._values[argument])
        if made is None or made.act != "none":
            return None
        reader = node
        while True:
            if [user for user in argument.users if needs_step(user)] != [reader]:
                return None
            if argument not in self._other_name_of:
                return made
            reader, argument = argument, self._other_name_of[argument]

    def place_of(self, value: int) -> int:
        """Which step computes an activation; -1 of the images and of what several steps compute."""
        made = self._made_by.get(value)
        return -1 if made is None else self.found.steps.index(made)


def needs_step(node: fx.Node) -> bool:
    """Whether a node computes activations, not sizes."""
    value = node.meta.get("val")
    return value is None or isinstance(value, Tensor | tuple | list)
