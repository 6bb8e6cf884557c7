"""What was an operation of a traced network called with?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from vpns_kernels.engine.drafts import Lowering
from vpns_kernels.geometry import ConvGeometry, Pair


def arguments_of(node: fx.Node, *defaults: Any) -> Sequence[Any]:
    """All arguments of a call, by their places in its schema; the last ones by their defaults."""
    called: Any = node.target
    names = [argument.name for argument in called._schema.arguments]
    given, required = [*node.args], len(names) - len(defaults)
    for place in range(len(given), len(names)):
        given.append(node.kwargs.get(names[place], defaults[place - required] if place >= required else None))
    return given


def pair(sizes: Any) -> Pair:
    """(height, width) of an argument that is one number for both, or two."""
    found = [sizes] if isinstance(sizes, int) else list(sizes)
    return int(found[0]), int(found[-1])


def each_channel(to: Lowering, value: int) -> ConvGeometry:
    """The geometry of what maps each entry of an activation alone."""
    channels = to.size_of(value)[0]
    return ConvGeometry(channels, channels, (1, 1), groups=channels)
