"""Which steps run a traced network? Its operations, with batch norm, residual and activation taken in.

Every operation becomes a step or joins the step that computed its input, where nothing else reads what lies
between. Arithmetic on weights is in float64; they are rounded once, when they are packed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from vpns_kernels.engine.drafts import Draft, Lowered, Lowering, needs_step
from vpns_kernels.engine.plan import Op
from vpns_kernels.engine.trace import Traced
from vpns_kernels.geometry import ConvGeometry, Pair

aten = torch.ops.aten


def lower(traced: Traced) -> Lowered:
    """The steps of a traced network.

    Raises:
        LoweringError: the first operation that has none.
    """
    to = Lowering(traced)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            to.add_input(node)
        elif node.op == "output":
            to.set_output(node)
        elif needs_step(node):
            if node.target not in _HANDLERS:
                to.refuse(node, "a native step has no such operation")
            _HANDLERS[node.target](to, node)
    return to.found


def _convolution(to: Lowering, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, None, (1, 1), (0, 0), (1, 1), 1)
    K, C, R, S = to.tensor_of(node, weight).shape
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        reach = (dilation[0] * (R - 1), dilation[1] * (S - 1))
        if padding == "same" and (reach[0] % 2 or reach[1] % 2):
            to.refuse(node, "padding 'same' pads one side more than the other")
        padding = (reach[0] // 2, reach[1] // 2) if padding == "same" else (0, 0)
    geometry = ConvGeometry(C * groups, K, (R, S), stride, _pair(padding), dilation, groups)
    _add_weighted(to, node, "conv2d", x, weight, bias, geometry)


def _linear(to: Lowering, node: fx.Node) -> None:
    x, weight, bias = _arguments(node, None)
    if to.size_of(to.value_of(node, x))[1:] != (1, 1):
        to.refuse(node, "a native linear layer takes [N, C]")
    K, C = to.tensor_of(node, weight).shape
    _add_weighted(to, node, "linear", x, weight, bias, ConvGeometry(C, K, (1, 1)))


def _add_weighted(
    to: Lowering, node: fx.Node, op: Op, x: Any, weight: fx.Node, bias: Any, geometry: ConvGeometry
) -> None:
    layer, value = to.layer_of(weight), to.value_of(node, x)
    found = to.tensor_of(node, weight)
    kept = to.kept_of(layer, found).view(geometry.weight_shape)
    draft = Draft(
        op, layer, geometry, value, to.add_value(node), found.view(geometry.weight_shape), kept=kept
    )
    draft.bias = None if bias is None else to.tensor_of(node, bias)
    to.add_step(node, draft)


def _batch_norm(to: Lowering, node: fx.Node) -> None:
    x, weight, bias, mean, variance, _, eps = _arguments(node)
    scale = (to.tensor_of(node, variance) + eps).rsqrt()
    if weight is not None:
        scale = scale * to.tensor_of(node, weight)
    shift = -to.tensor_of(node, mean) * scale
    if bias is not None:
        shift = shift + to.tensor_of(node, bias)
    made = to.open_step(node, x)
    if made is not None and made.weight is not None and made.residual is None:
        made.weight = made.weight * scale.view(-1, 1, 1, 1)
        made.bias = shift if made.bias is None else made.bias * scale + shift
        return to.join(node, made)
    # On its own: a depthwise convolution of one pixel.
    value = to.value_of(node, x)
    geometry = _each_channel(to, value)
    draft = Draft(
        "conv2d", to.layer_of(mean), geometry, value, to.add_value(x), scale.view(-1, 1, 1, 1), shift
    )
    draft.kept = torch.ones(geometry.weight_shape, dtype=torch.bool)
    return to.add_step(node, draft)


def _first_result(to: Lowering, node: fx.Node) -> None:
    source, index = node.args
    if index != 0:
        to.refuse(node, "only the first result of an operation is used natively")
    to.name_again(node, source)


def _same(to: Lowering, node: fx.Node) -> None:
    to.name_again(node, node.args[0])


def _relu(to: Lowering, node: fx.Node) -> None:
    _activate(to, node, "relu")


def _relu6(to: Lowering, node: fx.Node) -> None:
    _activate(to, node, "relu6")


def _hardtanh(to: Lowering, node: fx.Node) -> None:
    _, low, high = _arguments(node, -1.0, 1.0)
    if (low, high) != (0.0, 6.0):
        to.refuse(node, f"expected the limits of ReLU6, 0 and 6, got {low} and {high}")
    _activate(to, node, "relu6")


def _activate(to: Lowering, node: fx.Node, act: str) -> None:
    x = node.args[0]
    value = to.value_of(node, x)
    assert isinstance(x, fx.Node)
    made = to.open_step(node, x)
    if made is not None and (made.weight is not None or made.op == "add"):
        made.act = act
        return to.join(node, made)
    draft = Draft("add", node.name, _each_channel(to, value), value, to.add_value(node), act=act)
    return to.add_step(node, draft)


def _add(to: Lowering, node: fx.Node) -> None:
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or node.kwargs.get("alpha", 1) != 1:
        to.refuse(node, "expected two activations")
    if to.size_of(to.value_of(node, a)) != to.size_of(to.value_of(node, b)):
        to.refuse(node, "expected activations of one size")
    # The later of the two can take in the other, which is there by then.
    first, last = sorted((a, b), key=lambda argument: to.place_of(to.value_of(node, argument)))
    residual, made = to.value_of(node, first), to.open_step(node, last)
    is_apart = residual != to.value_of(node, last)
    if made is not None and made.weight is not None and made.residual is None and is_apart:
        made.residual = residual
        return to.join(node, made)
    value = to.value_of(node, last)
    draft = Draft("add", node.name, _each_channel(to, value), value, to.add_value(node), residual=residual)
    return to.add_step(node, draft)


def _concatenate(to: Lowering, node: fx.Node) -> None:
    sources, axis = _arguments(node, 0)
    if axis not in (1, -3) or node.meta["val"].dim() != 4:
        to.refuse(node, f"expected channels of [N, C, H, W], got axis {axis}")
    values = [to.value_of(node, source) for source in sources]
    output, channel = to.add_value(node), 0
    for number, value in enumerate(values):
        draft = Draft("copy", f"{node.name}.{number}", _each_channel(to, value), value, output)
        draft.first_channel = channel
        to.add_step(node, draft)
        channel += to.size_of(value)[0]
    to.set_value(node, output)


def _max_pool(to: Lowering, node: fx.Node) -> None:
    x, window, stride, padding, dilation, _ = _arguments(node, (), (0, 0), (1, 1), False)
    if _pair(dilation) != (1, 1):
        to.refuse(node, "a native maximum has no dilation")
    _pool(to, node, "max_pool", x, window, stride, padding)


def _avg_pool(to: Lowering, node: fx.Node) -> None:
    x, window, stride, padding, ceil_mode, counts, divisor = _arguments(node, (), (0, 0), False, True, None)
    if ceil_mode or divisor is not None:
        to.refuse(node, "a native mean has neither ceil_mode nor a divisor of its own")
    _pool(to, node, "avg_pool", x, window, stride, padding, bool(counts))


def _pool(
    to: Lowering, node: fx.Node, op: Op, x: Any, window: Any, stride: Any, padding: Any, counts: bool = False
) -> None:
    value = to.value_of(node, x)
    channels = to.size_of(value)[0]
    strides = _pair(stride) if stride else _pair(window)
    geometry = ConvGeometry(channels, channels, _pair(window), strides, _pair(padding), groups=channels)
    draft = Draft(op, node.name, geometry, value, to.add_value(node), counts_padding=counts)
    to.add_step(node, draft)


def _adaptive_avg_pool(to: Lowering, node: fx.Node) -> None:
    value = to.value_of(node, node.args[0])
    if tuple(node.meta["val"].shape[-2:]) == to.size_of(value)[1:]:
        return to.name_again(node, node.args[0])
    draft = Draft("adaptive_avg_pool", node.name, _each_channel(to, value), value, to.add_value(node))
    return to.add_step(node, draft)


def _mean(to: Lowering, node: fx.Node) -> None:
    x, axes, *_ = _arguments(node, False, None)
    rank = x.meta["val"].dim()
    if rank != 4 or sorted(axis % rank for axis in axes) != [2, 3]:
        to.refuse(node, f"expected the mean over height and width, got axes {axes}")
    value = to.value_of(node, x)
    draft = Draft("adaptive_avg_pool", node.name, _each_channel(to, value), value, to.add_value(node))
    to.add_step(node, draft)


def _reshape(to: Lowering, node: fx.Node) -> None:
    value = to.value_of(node, node.args[0])
    channels, height, width = to.size_of(value)
    shape = list(node.meta["val"].shape)[1:]
    if shape == [channels, height, width] or (height * width == 1 and math.prod(shape) == channels):
        return to.name_again(node, node.args[0])
    if shape != [channels * height * width]:
        to.refuse(node, f"expected all of an image side by side, got {shape}")
    # In torch's order, channel by channel, as the weights that read it expect.
    return to.add_step(node, Draft("flatten", node.name, _each_channel(to, value), value, to.add_value(node)))


def _each_channel(to: Lowering, value: int) -> ConvGeometry:
    channels = to.size_of(value)[0]
    return ConvGeometry(channels, channels, (1, 1), groups=channels)


def _arguments(node: fx.Node, *defaults: Any) -> Sequence[Any]:
    """All arguments of a call, by their places in its schema; the last ones by their defaults."""
    called: Any = node.target
    names = [argument.name for argument in called._schema.arguments]
    given, required = [*node.args], len(names) - len(defaults)
    for place in range(len(given), len(names)):
        given.append(node.kwargs.get(names[place], defaults[place - required] if place >= required else None))
    return given


def _pair(sizes: Any) -> Pair:
    found = [sizes] if isinstance(sizes, int) else list(sizes)
    return int(found[0]), int(found[-1])


_HANDLERS: dict[Any, Callable[[Lowering, fx.Node], None]] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    operator.getitem: _first_result,
    aten.relu.default: _relu,
    aten.relu6.default: _relu6,
    aten.hardtanh.default: _hardtanh,
    aten.add.Tensor: _add,
    aten.cat.default: _concatenate,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.mean.dim: _mean,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.squeeze.dims: _reshape,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.dropout.default: _same,
}
