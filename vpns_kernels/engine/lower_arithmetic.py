"""How are sums, products and normalisations lowered? As residuals, as gates, or into weights beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine.arguments import arguments_of, each_channel
from vpns_kernels.engine.drafts import Draft, Lowering
from vpns_kernels.engine.lower_framed import add_framed, pad_framed, reads_framed


def batch_norm(to: Lowering, node: fx.Node) -> None:
    """Lower a batch norm in evaluation mode: a scale and a shift of each channel."""
    x, weight, bias, mean, variance, _, eps = arguments_of(node)
    scale = (to.tensor_of(node, variance) + eps).rsqrt()
    if weight is not None:
        scale = scale * to.tensor_of(node, weight)
    shift = -to.tensor_of(node, mean) * scale
    if bias is not None:
        shift = shift + to.tensor_of(node, bias)
    _scale(to, node, x, scale, shift, to.layer_of(mean), to.add_value)


def add(to: Lowering, node: fx.Node) -> None:
    """Two activations, or one and a constant."""
    a, b = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1:
        to.refuse(node, "expected a sum without alpha")
    if not _is_activation(to, b):
        return _combine(to, node, a, 1.0, b, 1.0)
    if not _is_activation(to, a):
        return _combine(to, node, b, 1.0, a, 1.0)
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    if to.size_of(to.value_of(node, a)) != to.size_of(to.value_of(node, b)):
        to.refuse(node, "expected activations of one size")
    # The later of the two can take in the other, which is there by then.
    first, last = sorted((a, b), key=lambda argument: to.place_of(to.value_of(node, argument)))
    residual, made = to.value_of(node, first), to.open_step(node, last)
    if made is not None and made.takes_residual and residual != to.value_of(node, last):
        made.residual = residual
        return to.join(node, made)
    value = to.value_of(node, last)
    draft = Draft("add", node.name, each_channel(to, value), value, to.add_value(node), residual=residual)
    return to.add_step(node, draft)


def subtract(to: Lowering, node: fx.Node) -> None:
    """An activation and a constant, in either order."""
    a, b = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1:
        to.refuse(node, "expected a difference without alpha")
    if _is_activation(to, a):
        return _combine(to, node, a, 1.0, b, -1.0)
    return _combine(to, node, b, -1.0, a, 1.0)


def subtract_from(to: Lowering, node: fx.Node) -> None:
    """A constant less an activation."""
    a, b = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        to.refuse(node, "expected a difference without alpha")
    return _combine(to, node, a, -1.0, b, 1.0)


def multiply(to: Lowering, node: fx.Node) -> None:
    """Two activations (one of which may be a factor of each channel), or one and a constant."""
    a, b = node.args[:2]
    if not _is_activation(to, b):
        return _combine(to, node, a, b, 0.0, 0.0)
    if not _is_activation(to, a):
        return _combine(to, node, b, a, 0.0, 0.0)
    values = [to.value_of(node, argument) for argument in (a, b)]
    sizes = [to.size_of(value) for value in values]
    if sizes[0][1:] == (1, 1) and sizes[1][1:] != (1, 1):
        values, sizes = values[::-1], sizes[::-1]
    if sizes[1] not in (sizes[0], (sizes[0][0], 1, 1)) or values[0] == values[1]:
        to.refuse(node, "expected two activations of one size, or a factor of each channel")
    draft = Draft("gate", node.name, each_channel(to, values[0]), values[0], to.add_value(node))
    draft.residual = values[1]
    return to.add_step(node, draft)


def divide(to: Lowering, node: fx.Node) -> None:
    """An activation by a constant."""
    a, b = node.args[:2]
    return _combine(to, node, a, 1.0 / to.tensor_of(node, b), 0.0, 0.0)


def pad(to: Lowering, node: fx.Node) -> None:
    """Zeros, or another constant, around what a convolution reads."""
    pad_framed(to, node)


def _is_activation(to: Lowering, argument: Any) -> bool:
    return to.has_value(argument) or argument in to.virtual


def _combine(to: Lowering, node: fx.Node, x: Any, scale: Any, shift: Any, sign: float) -> None:
    """scale · x + sign · shift, where both are constants."""
    if not _is_activation(to, x):
        to.refuse(node, f"expected an activation, got {x}")
    found, given = node.meta["val"], x.meta["val"]
    if found.dtype != given.dtype or found.shape[1:] != given.shape[1:]:
        to.refuse(node, f"expected {_describe(given)} to stay one, got {_describe(found)}")
    factor = scale if isinstance(scale, Tensor) else to.tensor_of(node, scale)
    summand = to.tensor_of(node, shift) * sign
    # What can change a layer before it does; else the convolution that reads it takes it in.
    made = to.open_step(node, x) if to.has_value(x) else None
    if (made is None or made.weight is None) and reads_framed(node):
        return add_framed(to, node, x, factor, summand)
    channels = int(node.meta["val"].shape[1])
    factor, summand = (_by_channel(to, node, constant, channels) for constant in (factor, summand))
    return _scale(to, node, x, factor, summand, node.name, lambda _: to.add_value(node))


def _describe(value: Tensor) -> str:
    return f"{dtype_name(value.dtype)} [N, {', '.join(map(str, value.shape[1:]))}]"


def _by_channel(to: Lowering, node: fx.Node, constant: Tensor, channels: int) -> Tensor:
    """[C] of a constant that is the same for all pixels."""
    rank = node.meta["val"].dim()
    shape = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    if len(shape) != rank or shape[0] != 1 or any(extent != 1 for extent in shape[2:]):
        to.refuse(node, f"expected a constant of each channel, got {list(constant.shape)}")
    return constant.reshape(-1).expand(channels)


def _scale(
    to: Lowering, node: fx.Node, x: fx.Node, scale: Tensor, shift: Tensor, layer: str, add_value: Any
) -> None:
    made = to.open_step(node, x)
    if made is not None and made.weight is not None and made.residual is None:
        made.weight = made.weight * scale.view(-1, 1, 1, 1)
        if made.constant is None:
            made.bias = shift if made.bias is None else made.bias * scale + shift
        else:
            made.constant = made.constant * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        return to.join(node, made)
    # On its own: a depthwise convolution of one pixel.
    value = to.value_of(node, x)
    geometry = each_channel(to, value)
    draft = Draft("conv2d", layer, geometry, value, add_value(x), scale.reshape(-1, 1, 1, 1), shift)
    draft.kept = torch.ones(geometry.weight_shape, dtype=torch.bool, device=scale.device)
    return to.add_step(node, draft)
