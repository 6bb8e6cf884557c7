"""Which activations of a network share their channels? The streams of a traced graph, and where their masks
go.

A stream is a set of activations whose channel k stands or falls together: a convolution begins one, batch
norm, activation, pooling and depthwise convolution continue it, a residual add ties two into one, so a pruned
network has consistent widths. A mask belongs where channels are mixed, on the last activation before the
convolution or linear layer that reads it (and before the pooling between them): after batch norm, residual
add and ReLU, where masked channels still get a gradient. The network's own outputs are never masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from vpns_kernels.graph_nodes import (
    is_add,
    is_dropout,
    is_flatten,
    is_layer,
    is_mixing,
    is_pointwise,
    is_pool,
)


@dataclass
class Stream:
    """One set of tied channels: how many, who makes them, who reads them, where they are masked."""

    channels: int
    producers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    sites: list[fx.Node] = field(default_factory=list)


def trace_streams(model: nn.Module) -> tuple[fx.GraphModule, list[Stream]]:
    """A traced copy of a network over the same layers, and its streams.

    Raises:
        NotImplementedError: a forward that branches on data, or channels that cannot be followed.
    """
    try:
        traced = fx.symbolic_trace(model)
    except fx.proxy.TraceError as error:
        raise NotImplementedError(
            f"channel pattern: expected a forward without branches on data, got: {error} "
            "(use an unstructured or block pattern for this network)"
        ) from error
    return traced, find_streams(traced)


def find_streams(graph_module: fx.GraphModule) -> list[Stream]:
    """The maskable streams of a traced network, in order of execution.

    Raises:
        NotImplementedError: naming the node, where channels meet an operation that is not understood.
    """
    modules = dict(graph_module.named_modules())
    stream_of: dict[fx.Node, Stream | None] = {}
    called: set[str] = set()
    # Activations whose pixels lie where channels were.
    flat: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if is_layer(node, modules):
            if str(node.target) in called:
                _refuse(node, "each layer to be called once", "a second call")
            called.add(str(node.target))
        stream_of[node] = _stream_after(node, modules, stream_of)
        if stream_of[node] is not None and (
            is_flatten(node, modules) or flat.intersection(node.all_input_nodes)
        ):
            flat.add(node)
            if not (is_flatten(node, modules) or is_dropout(node, modules)):
                _refuse(node, "nothing but dropout after flatten", f"{node.op} {node.target}")
    for node in graph_module.graph.nodes:
        if is_mixing(node, modules):
            site = node.all_input_nodes[0]
            while site in flat or is_pool(site, modules):
                site = site.all_input_nodes[0]
            stream = stream_of[site]
            if stream is not None and site not in stream.sites:
                stream.sites.append(site)
    streams = {id(stream): stream for stream in stream_of.values() if stream is not None}
    return [stream for stream in streams.values() if stream.sites and stream.producers]


def _stream_after(
    node: fx.Node, modules: dict[str, nn.Module], stream_of: dict[fx.Node, Stream | None]
) -> Stream | None:
    """The stream of a node's output; None where its channels are nobody's to prune (input, classifier)."""
    inputs = [stream_of[source] for source in node.all_input_nodes]
    if node.op == "output":
        for stream in inputs:
            _give_up(stream, stream_of)
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.kwargs.get("training") is not None:
        # Tracing has written the mode of the moment into the graph.
        _refuse(node, "dropout and batch norm as modules", "a function with a fixed mode")
    module = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d):
        return _through_conv(node, module, inputs[0])
    if isinstance(module, nn.Linear):
        if inputs[0] is not None:
            if module.in_features % inputs[0].channels:
                _refuse(node, f"inputs of {inputs[0].channels} channels", f"{module.in_features} features")
            inputs[0].consumers.append(str(node.target))
        return None
    if isinstance(module, nn.BatchNorm2d) and inputs[0] is not None:
        inputs[0].norms.append(str(node.target))
    if is_add(node) and len(inputs) == 2:
        return _tie(node, inputs[0], inputs[1], stream_of)
    if is_pointwise(node, modules) or is_pool(node, modules) or is_flatten(node, modules):
        return inputs[0]
    if all(stream is None for stream in inputs):
        return None
    _refuse(
        node,
        "convolution, batch norm, activation, pooling, flatten, add or linear layer",
        f"{node.op} {node.target}",
    )


def _refuse(node: fx.Node, expected: str, got: str) -> NoReturn:
    raise NotImplementedError(
        f"channel pattern: expected {expected}, got {got} at {node.name!r} "
        "(use an unstructured or block pattern for this network)"
    )


def _through_conv(node: fx.Node, conv: nn.Conv2d, before: Stream | None) -> Stream | None:
    if conv.groups == 1:
        if before is not None:
            before.consumers.append(str(node.target))
        return Stream(conv.out_channels, producers=[str(node.target)])
    if conv.groups == conv.in_channels == conv.out_channels:
        if before is not None:
            before.producers.append(str(node.target))
        return before
    _refuse(node, "groups 1 or depthwise", f"groups {conv.groups}")


def _give_up(dead: Stream | None, stream_of: dict[fx.Node, Stream | None]) -> None:
    """Nobody may prune this stream."""
    for node, stream in stream_of.items():
        if stream is dead:
            stream_of[node] = None


def _tie(
    node: fx.Node, a: Stream | None, b: Stream | None, stream_of: dict[fx.Node, Stream | None]
) -> Stream | None:
    """Two streams that are added become one; one added to something unprunable is unprunable."""
    if a is b:
        return a
    if a is None or b is None:
        _give_up(a or b, stream_of)
        return None
    if a.channels != b.channels:
        _refuse(node, "an add of as many channels", f"{a.channels} and {b.channels}")
    for name in ("producers", "norms", "consumers"):
        getattr(a, name).extend(getattr(b, name))
    for other, stream in stream_of.items():
        if stream is b:
            stream_of[other] = a
    return a


@torch.no_grad()
def zero_channels(graph_module: fx.GraphModule, stream: Stream, keep: Tensor) -> None:
    """Zero every weight that makes or reads a dropped channel, so that the plain network needs no mask."""
    modules = dict(graph_module.named_modules())
    for name in stream.producers + stream.norms:
        layer = modules[name]
        for parameter in (layer.weight, layer.bias):
            if isinstance(parameter, Tensor):
                parameter[~keep] = 0
    for name in stream.consumers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        # A linear layer after flatten reads each channel once per pixel.
        per_channel = weight.shape[1] // stream.channels
        weight[:, ~keep.repeat_interleave(per_channel)] = 0
