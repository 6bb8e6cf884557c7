"""Which channels of a traced network are the same ones, and which hold a constant whatever the input is?

Each channel of each activation has an id. A convolution makes new ones; batch norm, activation, pooling and
depthwise convolution pass them on, concatenation lines them up, an add ties two sets into one. What is not
understood pins the channels it meets: they stay as they are. Beside each id goes the value that the channel
has at every pixel where weights alone tell it: 0 behind filters of zeros, relu(b) behind their batch norm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vpns_kernels.graph_nodes import (
    drops_pixels,
    is_cat,
    is_elementwise,
    is_flatten,
    is_flattening_view,
    is_in_place,
    is_pointwise,
    is_pool,
    reads_batch,
    reads_shape,
)
from vpns_kernels.tracing import find_single_calls, has_hooks

_ALIASES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_SUMS: dict[Any, Callable[[Any, Any], Any]] = {
    operator.add: operator.add, operator.iadd: operator.add, torch.add: operator.add, "add": operator.add,
    "add_": operator.add, operator.sub: operator.sub, operator.isub: operator.sub, torch.sub: operator.sub,
}  # fmt: skip
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True)
class Flow:
    """What is known of an activation: ids and constants of its channels.

    Args:
        values: float64 [C], NaN where a channel is no constant.
        is_flat: [N, C · pixels], as a flatten or a linear layer leaves it, which alone a linear layer reads.
    """

    ids: Tensor
    values: Tensor
    is_flat: bool = False


@dataclass(frozen=True)
class Place:
    """A convolution, linear layer or batch norm with its input and output; None where not followed."""

    layer: nn.Module
    before: Flow | None
    after: Flow | None

    @property
    def is_mixing(self) -> bool:
        """Whether it makes new channels of all that it reads."""
        return isinstance(self.layer, nn.Linear) or (
            isinstance(self.layer, nn.Conv2d) and self.layer.groups == 1
        )

    @property
    def pads_zeros(self) -> bool:
        """Whether some of what it reads lies outside the image, and is 0 there."""
        layer = self.layer
        if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
            return False
        if isinstance(layer.padding, str):
            return layer.padding == "same" and max(layer.kernel_size) > 1
        return max(layer.padding) > 0

    def taps(self) -> Tensor:
        """The weight as [K, C, taps] float64; behind a flatten, a tap is a pixel."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        channels = weight.shape[1] if self.before is None or not self.is_mixing else len(self.before.ids)
        return weight.detach().cpu().double().reshape(weight.shape[0], channels, -1)


class ChannelFlow:
    """Follows the channels of a traced network in evaluation mode, front to back."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._modules = dict(traced.named_modules())
        self._own_weights = find_single_calls(traced) - _shared(traced)
        self._order = {node: number for number, node in enumerate(traced.graph.nodes)}
        self._parents: list[int] = []
        self._pinned: set[int] = set()
        self.places: dict[str, Place] = {}
        self.flows: dict[fx.Node, Flow | None] = {}
        self.output: fx.Node | None = None
        for node in traced.graph.nodes:
            self.flows[node] = self._follow(node)

    def roots(self, ids: Tensor) -> Tensor:
        """One id for each set of tied ones."""
        return torch.tensor([self._root(number) for number in ids.tolist()], dtype=torch.long)

    def pinned(self) -> Tensor:
        """Bool by id: whether something reads the channel that cannot do without it."""
        found = torch.zeros(len(self._parents), dtype=torch.bool)
        found[self.roots(torch.tensor(sorted(self._pinned), dtype=torch.long))] = True
        return found

    def _follow(self, node: fx.Node) -> Flow | None:
        inputs = [self.flows[source] for source in node.all_input_nodes if not reads_batch(source)]
        if node.op == "output":
            self.output = node.all_input_nodes[0] if len(inputs) == 1 else None
            return self._pin(inputs)
        if node.op in ("placeholder", "get_attr") or reads_batch(node) or reads_shape(node):
            return None
        if is_in_place(node, self._modules) and self._is_read_later(node):
            return self._pin(inputs)
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and (has_hooks(module) or len(node.args) != 1 or node.kwargs):
            return self._pin(inputs)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):
            return self._through_layer(str(node.target), module, inputs[0])
        if is_cat(node) and None not in inputs:
            parts = [self.flows[source] for source in node.args[0]]  # type: ignore[union-attr, index]
            return self._cat([part for part in parts if part is not None])
        if node.target in _SUMS.keys() | _PRODUCTS:
            return self._combine(node)
        if len(inputs) != 1 or inputs[0] is None:
            return self._pin(inputs)
        return self._through_one(node, module, inputs[0])

    def _through_one(self, node: fx.Node, module: nn.Module | None, before: Flow) -> Flow | None:
        """Behind what works on each channel of one activation alone."""
        if is_flatten(node, self._modules) or is_flattening_view(node):
            return Flow(before.ids, before.values, is_flat=True)
        if is_pool(node, self._modules) and not before.is_flat:
            is_kept = _keeps_constants(node, module) | (before.values == 0)
            return Flow(before.ids, before.values.where(is_kept, math.nan), drops_pixels(node))
        if node.kwargs.get("training"):
            return self._pin([before])
        if is_elementwise(node, self._modules) or is_pointwise(node, self._modules):
            return Flow(before.ids, self._apply(node, module, before.values), before.is_flat)
        return self._pin([before])

    def _through_layer(self, name: str, layer: nn.Module, before: Flow | None) -> Flow | None:
        if name not in self._own_weights or not _is_plain(layer):
            return self._pin([before])
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            if before is None or len(before.ids) != layer.num_features or layer.running_mean is None:
                return self._pin([before])
            after = Flow(before.ids, _normalise(layer, before.values), before.is_flat)
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            is_depthwise = layer.groups == layer.in_channels
            if before is None or before.is_flat or not is_depthwise:
                return self._pin([before])
            each = layer.out_channels // layer.groups
            given = Flow(before.ids.repeat_interleave(each), before.values.repeat_interleave(each))
            place = Place(layer, given, None)
            after = Flow(given.ids, _constants(place, given.values[:, None]))
        else:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            count, size = layer.weight.shape[:2]
            if before is not None and not _fits(layer, before):
                return self._pin([before])
            place = Place(layer, before, None)
            unknown = torch.full((size,), math.nan, dtype=torch.float64)
            values = _constants(place, unknown if before is None else before.values)
            after = Flow(self._new(count), values, is_flat=isinstance(layer, nn.Linear))
        self.places[name] = Place(layer, before, after)
        return after

    def _apply(self, node: fx.Node, module: nn.Module | None, values: Tensor) -> Tensor:
        """A pointwise function of the constants; what is unknown stays so."""
        given = values.nan_to_num(0.0).clone()
        if module is not None:
            found = module(given)
        elif node.op == "call_method":
            found = getattr(given, str(node.target))(*node.args[1:], **node.kwargs)
        else:
            found = node.target(given, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return torch.where(values.isnan(), values, found)

    def _combine(self, node: fx.Node) -> Flow | None:
        """Behind the sum, difference or product of two activations, or of one and a number."""
        sides = [self.flows[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        flows = [side for side in sides if isinstance(side, Flow)]
        is_product = node.target in _PRODUCTS
        function = operator.mul if is_product else _SUMS[node.target]
        if len(sides) != 2 or node.kwargs or not all(isinstance(s, Flow | int | float) for s in sides):
            return self._pin(flows)
        a, b = (side.values if isinstance(side, Flow) else side for side in sides)
        if len(flows) == 1:
            return Flow(flows[0].ids, function(a, b), flows[0].is_flat)
        if len(flows[0].ids) != len(flows[1].ids) or flows[0].is_flat != flows[1].is_flat:
            return self._pin(flows)
        for one, other in zip(flows[0].ids.tolist(), flows[1].ids.tolist(), strict=True):
            self._parents[self._root(one)] = self._root(other)
        values = function(a, b)
        if is_product:
            values = values.masked_fill((a == 0) | (b == 0), 0.0)
        return Flow(flows[0].ids, values, flows[0].is_flat)

    def _cat(self, parts: Sequence[Flow]) -> Flow | None:
        if any(part.is_flat for part in parts):
            return self._pin(parts)
        return Flow(torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts]))

    def _pin(self, flows: Sequence[Flow | None]) -> Flow | None:
        """None of these channels may go, and what becomes of them is not followed."""
        for flow in flows:
            if flow is not None:
                self._pinned.update(flow.ids.tolist())
        return None

    def _new(self, count: int) -> Tensor:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def _is_read_later(self, node: fx.Node) -> bool:
        """Whether somebody sees what an operation in place has left in its input."""
        source = node.args[0]
        while isinstance(source, fx.Node):
            if any(self._order[user] > self._order[node] for user in source.users):
                return True
            is_alias = source.op == "call_module" and isinstance(self._modules[str(source.target)], _ALIASES)
            is_alias = is_alias or is_flatten(source, self._modules) or is_flattening_view(source)
            source = source.args[0] if is_alias else None
        return False


def _constants(place: Place, values: Tensor) -> Tensor:
    """Constants [K] behind a layer whose inputs have constants [C], or [K, 1] one by one."""
    taps = place.taps()
    is_harmless = values == 0 if place.pads_zeros else ~values.isnan()
    is_zero = (taps == 0).all(dim=2)
    found = (taps.sum(dim=2) * values.where(is_harmless, 0.0)).sum(dim=1)
    if isinstance(place.layer.bias, Tensor):
        found = found + place.layer.bias.detach().cpu().double()
    return found.where((is_zero | is_harmless).all(dim=1), math.nan)


def _normalise(bn: nn.BatchNorm2d | nn.BatchNorm1d, values: Tensor) -> Tensor:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = (bn.running_var.cpu().double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().cpu().double()
    # Times zero, whatever comes in is the same.
    found = (values - bn.running_mean.cpu().double()).masked_fill(scale == 0, 0.0) * scale
    return found if bn.bias is None else found + bn.bias.detach().cpu().double()


def _keeps_constants(node: fx.Node, module: nn.Module | None) -> Tensor:
    """Whether a pooling gives a constant for the same constant at the border, too."""
    if isinstance(module, nn.AvgPool2d):
        pads = module.padding not in (0, (0, 0)) and module.count_include_pad
        return torch.tensor(not pads and module.divisor_override is None)
    return torch.tensor(node.target is not F.avg_pool2d)


def _fits(layer: nn.Conv2d | nn.Linear, before: Flow) -> bool:
    size = layer.weight.shape[1]
    if isinstance(layer, nn.Conv2d):
        return not before.is_flat and size == len(before.ids)
    # A linear layer behind a convolution reads rows of pixels, not channels.
    return before.is_flat and size % len(before.ids) == 0


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)


def _shared(traced: fx.GraphModule) -> set[str]:
    """Layers whose parameters another one has as well."""
    owners: dict[int, set[str]] = {}
    for name, module in traced.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}
