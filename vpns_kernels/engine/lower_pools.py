"""How are pools lowered? Each as a step of its own."""

from __future__ import annotations

from typing import Any

from torch import fx

from vpns_kernels.engine.arguments import arguments_of, each_channel, pair
from vpns_kernels.engine.drafts import Draft, Lowering
from vpns_kernels.engine.plan import Op
from vpns_kernels.geometry import ConvGeometry


def max_pool(to: Lowering, node: fx.Node) -> None:
    """The largest of each window."""
    x, window, stride, padding, dilation, _ = arguments_of(node, (), (0, 0), (1, 1), False)
    if pair(dilation) != (1, 1):
        to.refuse(node, "a native maximum has no dilation")
    _pool(to, node, "max_pool", x, window, stride, padding)


def avg_pool(to: Lowering, node: fx.Node) -> None:
    """The mean of each window."""
    x, window, stride, padding, ceil_mode, counts, divisor = arguments_of(node, (), (0, 0), False, True, None)
    if ceil_mode or divisor is not None:
        to.refuse(node, "a native mean has neither ceil_mode nor a divisor of its own")
    _pool(to, node, "avg_pool", x, window, stride, padding, bool(counts))


def adaptive_avg_pool(to: Lowering, node: fx.Node) -> None:
    """The means of equal parts."""
    value = to.value_of(node, node.args[0])
    if tuple(node.meta["val"].shape[-2:]) == to.size_of(value)[1:]:
        return to.name_again(node, node.args[0])
    draft = Draft("adaptive_avg_pool", node.name, each_channel(to, value), value, to.add_value(node))
    return to.add_step(node, draft)


def mean(to: Lowering, node: fx.Node) -> None:
    """Over all pixels."""
    x, axes, *_ = arguments_of(node, False, None)
    rank = x.meta["val"].dim()
    if rank != 4 or sorted(axis % rank for axis in axes) != [2, 3]:
        to.refuse(node, f"expected the mean over height and width, got axes {axes}")
    value = to.value_of(node, x)
    draft = Draft("adaptive_avg_pool", node.name, each_channel(to, value), value, to.add_value(node))
    to.add_step(node, draft)


def _pool(
    to: Lowering, node: fx.Node, op: Op, x: Any, window: Any, stride: Any, padding: Any, counts: bool = False
) -> None:
    value = to.value_of(node, x)
    channels = to.size_of(value)[0]
    strides = pair(stride) if stride else pair(window)
    geometry = ConvGeometry(channels, channels, pair(window), strides, pair(padding), groups=channels)
    draft = Draft(op, node.name, geometry, value, to.add_value(node), counts_padding=counts)
    to.add_step(node, draft)
