"""Which steps run a traced network? Its operations, with batch norm, residual and activation taken in.

Every operation becomes a step or joins the step that computed its input, where nothing else reads what lies
between. Arithmetic on weights is in float64; they are rounded once, when they are packed. What no step
computes is left to torch (partition.py says what, programs.py how).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from vpns_kernels.engine.arguments import arguments_of, each_channel, pair
from vpns_kernels.engine.drafts import Draft, Framed, Lowered, Lowering, LoweringError
from vpns_kernels.engine.lower_arithmetic import (
    add,
    batch_norm,
    divide,
    multiply,
    pad,
    subtract,
    subtract_from,
)
from vpns_kernels.engine.lower_channels import (
    concatenate,
    reshape,
    select,
    slice_channels,
    split,
    take_outputs,
    take_piece,
    transpose,
    unsqueeze,
)
from vpns_kernels.engine.lower_framed import convolve_framed
from vpns_kernels.engine.lower_pools import adaptive_avg_pool, avg_pool, max_pool, mean
from vpns_kernels.engine.partition import Segment, find_segments
from vpns_kernels.engine.plan import Op
from vpns_kernels.engine.programs import make_program
from vpns_kernels.engine.trace import Traced
from vpns_kernels.geometry import ConvGeometry

aten = torch.ops.aten


def lower(traced: Traced, is_native: bool = True) -> Lowered:
    """The steps of a traced network.

    Args:
        is_native: False leaves everything to torch.

    Raises:
        LoweringError: it returns something else than one activation.
    """
    to = Lowering(traced)
    nodes = list(traced.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            to.add_input(node)
    for number, segment in enumerate(find_segments(traced, lower_node, is_native)):
        to.segment = number
        if segment.is_native:
            for node in segment.nodes:
                _lower_virtual(to, node, segment)
                lower_node(to, node)
        else:
            _leave_to_torch(to, traced, segment)
    if not to.found.steps:
        raise LoweringError("compile: expected a network that computes something, got its input back")
    to.set_output(nodes[-1])
    return to.found


def lower_node(to: Lowering, node: fx.Node) -> None:
    """The step of one operation, or its share of another; LoweringError where there is none."""
    if node.target not in _HANDLERS:
        to.refuse(node, "a native step has no such operation")
    _HANDLERS[node.target](to, node)


def _lower_virtual(to: Lowering, node: fx.Node, segment: Segment) -> None:
    """What is in front of an operation and part of it."""
    for source in node.all_input_nodes:
        if source in segment.virtual and source not in to.virtual:
            _lower_virtual(to, source, segment)
            lower_node(to, source)


def _leave_to_torch(to: Lowering, traced: Traced, segment: Segment) -> None:
    program = make_program(traced, segment, to)
    same = sum(other.name.partition(" ")[0] == program.name for other in to.found.programs)
    program = replace(program, name=f"{program.name} {same + 1}" if same else program.name)
    to.found.programs.append(program)
    reads = [port.value for port in program.reads if port.value >= 0]
    writes = [port.value for port in program.writes if port.value >= 0]
    for place in range(max(len(reads), len(writes), 1)):
        x = reads[place] if place < len(reads) else None
        output = writes[place] if place < len(writes) else None
        to.found.steps.append(
            Draft("torch", program.name, ConvGeometry(1, 1, (1, 1)), x, output, segment=to.segment)
        )


def _convolution(to: Lowering, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = arguments_of(node, None, (1, 1), (0, 0), (1, 1), 1)
    shape = to.tensor_of(node, weight).shape
    stride, dilation = pair(stride), pair(dilation)
    if isinstance(padding, str):
        reach = (dilation[0] * (shape[2] - 1), dilation[1] * (shape[3] - 1))
        if padding == "same" and (reach[0] % 2 or reach[1] % 2):
            to.refuse(node, "padding 'same' pads one side more than the other")
        padding = (reach[0] // 2, reach[1] // 2) if padding == "same" else (0, 0)
    geometry = ConvGeometry.from_weight(shape, stride, pair(padding), dilation, groups)
    if isinstance(framed := to.virtual.get(x), Framed):
        return convolve_framed(to, node, framed, weight, bias, geometry)
    return _add_weighted(to, node, "conv2d", x, weight, bias, geometry)


def _linear(to: Lowering, node: fx.Node) -> None:
    x, weight, bias = arguments_of(node, None)
    if to.size_of(to.value_of(node, x))[1:] != (1, 1) or x.meta["val"].dim() != 2:
        to.refuse(node, "a native linear layer takes [N, C]")
    K, C = to.tensor_of(node, weight).shape
    _add_weighted(to, node, "linear", x, weight, bias, ConvGeometry(C, K, (1, 1)))


def _add_weighted(
    to: Lowering, node: fx.Node, op: Op, x: Any, weight: fx.Node, bias: Any, geometry: ConvGeometry
) -> None:
    layer, value = to.layer_of(weight), to.value_of(node, x)
    found = to.tensor_of(node, weight)
    kept = to.kept_of(layer, found).view(geometry.weight_shape)
    bias = None if bias is None else to.tensor_of(node, bias)
    draft = Draft(op, layer, geometry, value, to.add_value(node), found.view(geometry.weight_shape), bias)
    draft.kept = kept
    to.add_step(node, draft)


def _result(to: Lowering, node: fx.Node) -> None:
    source, index = node.args
    if isinstance(source, fx.Node) and source in to.virtual:
        return take_piece(to, node)
    if index != 0:
        to.refuse(node, "only the first result of an operation is used natively")
    return to.name_again(node, source)


def _same(to: Lowering, node: fx.Node) -> None:
    (x, *_) = node.args
    if isinstance(x, fx.Node) and x in to.virtual:
        to.virtual[node] = to.virtual[x]
    else:
        to.name_again(node, x)


def _hardtanh(to: Lowering, node: fx.Node) -> None:
    _, low, high = arguments_of(node, -1.0, 1.0)
    if (low, high) != (0.0, 6.0):
        to.refuse(node, f"expected the limits of ReLU6, 0 and 6, got {low} and {high}")
    _activate(to, node, "relu6")


def _gelu(to: Lowering, node: fx.Node) -> None:
    _, approximation = arguments_of(node, "none")
    if approximation != "none":
        to.refuse(node, f"expected GELU itself, got its approximation {approximation!r}")
    _activate(to, node, "gelu")


def _activation(act: str) -> Callable[[Lowering, fx.Node], None]:
    return lambda to, node: _activate(to, node, act)


def _activate(to: Lowering, node: fx.Node, act: str) -> None:
    x = node.args[0]
    value = to.value_of(node, x)
    assert isinstance(x, fx.Node)
    made = to.open_step(node, x)
    if made is not None and (made.weight is not None or made.op == "add"):
        made.act = act
        return to.join(node, made)
    draft = Draft("add", node.name, each_channel(to, value), value, to.add_value(node), act=act)
    return to.add_step(node, draft)


_HANDLERS: dict[Any, Callable[[Lowering, fx.Node], None]] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
    operator.getitem: _result,
    aten.relu.default: _activation("relu"),
    aten.relu6.default: _activation("relu6"),
    aten.hardtanh.default: _hardtanh,
    aten.silu.default: _activation("silu"),
    aten.hardswish.default: _activation("hardswish"),
    aten.hardsigmoid.default: _activation("hardsigmoid"),
    aten.sigmoid.default: _activation("sigmoid"),
    aten.gelu.default: _gelu,
    aten.add.Tensor: add,
    aten.sub.Tensor: subtract,
    aten.rsub.Scalar: subtract_from,
    aten.rsub.Tensor: subtract_from,
    aten.mul.Tensor: multiply,
    aten.div.Tensor: divide,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.cat.default: concatenate,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.chunk.default: split,
    aten.slice.Tensor: slice_channels,
    aten.select.int: select,
    aten.index_select.default: take_outputs,
    aten.transpose.int: transpose,
    aten.max_pool2d.default: max_pool,
    aten.avg_pool2d.default: avg_pool,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten.mean.dim: mean,
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.reshape.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.squeeze.dims: reshape,
    aten.unsqueeze.default: unsqueeze,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.dropout.default: _same,
}
