"""How are channels put together, taken apart, put in another order? By copies, or by none where it can be."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from vpns_kernels.engine.arguments import arguments_of, each_channel
from vpns_kernels.engine.drafts import Draft, Lowering, Part
from vpns_kernels.geometry import ConvGeometry


def concatenate(to: Lowering, node: fx.Node) -> None:
    """Channels of several activations side by side."""
    sources, axis = arguments_of(node, 0)
    if axis % node.meta["val"].dim() != 1:
        to.refuse(node, f"expected channels of [N, C, H, W], got axis {axis}")
    values = [to.value_of(node, source) for source in sources]
    output, channel = to.add_value(node), 0
    for number, value in enumerate(values):
        draft = Draft("copy", f"{node.name}.{number}", each_channel(to, value), value, output)
        draft.first_channel = channel
        to.add_step(node, draft)
        channel += to.size_of(value)[0]
    to.set_value(node, output)


def split(to: Lowering, node: fx.Node) -> None:
    """Pieces of channels; each is copied when it is taken."""
    x, _, axis = arguments_of(node, 0)
    if axis not in (1, -3) or x.meta["val"].dim() != 4:
        to.refuse(node, f"expected channels of [N, C, H, W], got axis {axis}")
    to.value_of(node, x)
    to.virtual[node] = Part("pieces", x)


def take_piece(to: Lowering, node: fx.Node) -> None:
    """One of what `split` has split."""
    source: Any
    source, index = node.args
    part = to.virtual[source]
    if not isinstance(part, Part) or part.kind != "pieces":
        to.refuse(node, "expected a piece of channels")
    before = source.meta["val"][:index]
    _copy_channels(to, node, part.source, sum(int(piece.shape[1]) for piece in before))


def slice_channels(to: Lowering, node: fx.Node) -> None:
    """Some channels side by side."""
    x, axis, start, _, step = arguments_of(node, 0, None, None, 1)
    if x.meta["val"].dim() != 4 or step != 1:
        to.refuse(node, f"expected channels of [N, C, H, W] without steps, got axis {axis} by {step}")
    if list(node.meta["val"].shape[1:]) == list(x.meta["val"].shape[1:]) and axis % 4 != 0:
        return to.name_again(node, x)
    if axis % 4 != 1:
        to.refuse(node, f"expected channels of [N, C, H, W], got axis {axis}")
    channels = to.size_of(to.value_of(node, x))[0]
    start = start or 0
    return _copy_channels(to, node, x, start + channels if start < 0 else min(start, channels))


def select(to: Lowering, node: fx.Node) -> None:
    """One channel, which lacks its axis."""
    x, axis, index = arguments_of(node)
    rank = x.meta["val"].dim()
    if rank != 4 or axis % rank != 1:
        to.refuse(node, f"expected a channel of [N, C, H, W], got axis {axis}")
    channels = to.size_of(to.value_of(node, x))[0]
    to.virtual[node] = Part("channels", x, index % channels, 1)


def unsqueeze(to: Lowering, node: fx.Node) -> None:
    """The axis of channels is there again; or pixels are added, one of each."""
    (x, axis) = node.args
    assert isinstance(x, fx.Node)
    part = to.virtual.get(x)
    if isinstance(part, Part) and part.kind == "channels" and axis in (1, -3):
        return _copy_channels(to, node, part.source, part.first)
    return reshape(to, node)


def take_outputs(to: Lowering, node: fx.Node) -> None:
    """Some outputs of the layer before, in any order: its other rows go."""
    x, axis, index = arguments_of(node)
    to.value_of(node, x)
    made = to.open_step(node, x)
    if (
        axis not in (1, 1 - x.meta["val"].dim())
        or made is None
        or made.op != "linear"
        or made.residual is not None
    ):
        to.refuse(node, "expected outputs of a linear layer that nothing else reads")
    assert made.weight is not None
    assert made.kept is not None
    rows = to.tensor_of(node, index).long()
    made.weight, made.kept = made.weight[rows], made.kept[rows]
    made.bias = None if made.bias is None else made.bias[rows]
    made.geometry = ConvGeometry(made.geometry.in_channels, len(rows), (1, 1))
    made.output = to.add_value(node)
    to.set_step(node, made)


def transpose(to: Lowering, node: fx.Node) -> None:
    """Groups of channels and their members exchanged, as in a shuffle."""
    (x, *axes) = node.args
    part = to.virtual.get(x)  # type: ignore[arg-type]
    if not isinstance(part, Part) or part.kind != "groups" or sorted(axes) != [1, 2]:  # type: ignore[type-var]
        to.refuse(node, "a native step exchanges groups of channels with their members alone")
    to.virtual[node] = Part("members", part.source, 0, part.size)


def reshape(to: Lowering, node: fx.Node) -> None:
    """All of an image side by side, or groups of channels, which are shuffled next."""
    (x, *_) = node.args
    assert isinstance(x, fx.Node)
    shape = list(node.meta["val"].shape)[1:]
    if isinstance(part := to.virtual.get(x), Part):
        return _shuffle(to, node, part)
    value = to.value_of(node, x)
    channels, height, width = to.size_of(value)
    if len(shape) == 4 and shape[0] * shape[1] == channels and shape[2:] == [height, width]:
        to.virtual[node] = Part("groups", x, 0, shape[0])
        return None
    is_same = shape == [channels, height, width]
    if is_same or (height * width == 1 and len(shape) in (1, 3) and shape[0] == math.prod(shape) == channels):
        return to.name_again(node, x)
    if shape != [channels * height * width]:
        to.refuse(node, f"expected all of an image side by side, got {shape}")
    # In torch's order, channel by channel, as the weights that read it expect.
    return to.add_step(node, Draft("flatten", node.name, each_channel(to, value), value, to.add_value(node)))


def _shuffle(to: Lowering, node: fx.Node, part: Part) -> None:
    value = to.value_of(node, part.source)
    if part.kind not in ("members", "groups") or tuple(node.meta["val"].shape[1:]) != to.size_of(value):
        to.refuse(node, "expected channels in another order")
    if part.kind == "groups":
        return to.name_again(node, part.source)
    channels = to.size_of(value)[0]
    geometry = ConvGeometry(channels, channels, (1, 1), groups=part.size)
    return to.add_step(node, Draft("shuffle", node.name, geometry, value, to.add_value(node)))


def _copy_channels(to: Lowering, node: fx.Node, source: fx.Node, first: int) -> None:
    value, output = to.value_of(node, source), to.add_value(node)
    geometry = ConvGeometry(to.size_of(value)[0], to.size_of(output)[0], (1, 1))
    to.add_step(node, Draft("copy", node.name, geometry, value, output, read_channel=first))
