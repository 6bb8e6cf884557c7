"""What of a network runs natively, and what is left to torch? Few segments, in turn native and torch's.

An operation that some step computes is native. Each operation goes into the earliest segment that has all it
reads; segments without a convolution or linear layer, between two of torch's, are not worth their borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from vpns_kernels.engine.drafts import Lowering, LoweringError
from vpns_kernels.engine.trace import Traced, is_computed

aten = torch.ops.aten
_WEIGHTED = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)


@dataclass(frozen=True, eq=False)
class Segment:
    """Operations that run together.

    Args:
        nodes: in order.
        virtual: of the whole network, operations that are part of what reads them.
        reasons: of torch's operations, why no native step computes them.
    """

    is_native: bool
    nodes: list[fx.Node]
    virtual: frozenset[fx.Node]
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def find_segments(
    traced: Traced, lower_node: Callable[[Lowering, fx.Node], None], is_native: bool = True
) -> list[Segment]:
    """All operations of a network that compute activations, in segments to be run in order.

    Args:
        lower_node: adds the step of one operation; LoweringError where there is none.
        is_native: False leaves all of them to torch.
    """
    nodes = [
        node
        for node in traced.graph.nodes
        if node.op == "call_function" and is_computed(node) and node.name not in traced.tensors
    ]
    reasons, virtual = _try_steps(traced, nodes, lower_node)
    own = [node for node in nodes if node not in virtual]
    torchs = set(reasons) if is_native else set(own)
    while True:
        levels = _find_levels(own, torchs)
        segments = {level: [n for n in own if levels[n] == level] for level in sorted(set(levels.values()))}
        poor = [n for level, found in segments.items() if level % 2 == 0 and _is_poor(found) for n in found]
        if not torchs or not poor:
            break
        torchs.update(poor)
    return [
        Segment(level % 2 == 0, found, virtual, {n: reasons[n] for n in found if n in reasons})
        for level, found in segments.items()
    ]


def _try_steps(
    traced: Traced, nodes: Iterable[fx.Node], lower_node: Callable[[Lowering, fx.Node], None]
) -> tuple[dict[fx.Node, str], frozenset[fx.Node]]:
    """Why operations have no step, and which are part of what reads them; by sizes alone."""
    trial = Lowering(traced.without_values())
    trial.add_input(traced.images)
    reasons = {}
    for node in nodes:
        try:
            lower_node(trial, node)
        except LoweringError as error:
            reasons[node] = str(error)
            if traced.is_activation(node):
                trial.set_value(node, trial.add_value(node))
    return reasons, frozenset(trial.virtual)


def _find_levels(nodes: Iterable[fx.Node], torchs: set[fx.Node]) -> dict[fx.Node, int]:
    """Of each operation its segment: even ones are native, odd ones torch's."""
    levels: dict[fx.Node, int] = {}

    def level_of(source: fx.Node) -> int:
        # What has no segment of its own (part of its readers, a size, a weight) is there with what it reads.
        return levels[source] if source in levels else _least(source)

    def _least(node: fx.Node) -> int:
        return max((level_of(source) for source in node.all_input_nodes), default=0)

    for node in nodes:
        least = _least(node)
        levels[node] = least + (least % 2 != (node in torchs))
    return levels


def _is_poor(nodes: Iterable[fx.Node]) -> bool:
    return not any(node.target in _WEIGHTED for node in nodes)
