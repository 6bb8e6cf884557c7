"""What does a node of a traced network do to the channels of an activation?"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_POINTWISE: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)
_POOLS: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POINTWISE_CALLS = {F.relu, F.relu6, torch.relu, F.silu, F.gelu, F.hardswish}
# Further ones, which neither masks of channels nor fused layers know; some make something of 0.
_ELEMENTWISE = (nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.ELU, nn.Mish, nn.Softplus)
_ELEMENTWISE_CALLS = {torch.sigmoid, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, torch.tanh, F.dropout}
_POOL_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_}
_ADDS = {operator.add, operator.iadd, torch.add}


def is_add(node: fx.Node) -> bool:
    """Whether the node adds, two activations or one and a number."""
    return (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )


def is_pointwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node maps each entry alone, or by what is its channel's: batch norm, activation, add."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POINTWISE)
    called = node.op == "call_function" and node.target in _POINTWISE_CALLS
    return called or is_add(node) or (node.op == "call_method" and node.target in ("relu", "relu_"))


def is_elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node maps each entry alone, by another function than those of `is_pointwise`."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _ELEMENTWISE)
    return node.op == "call_function" and node.target in _ELEMENTWISE_CALLS


def is_pool(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node works on each channel's pixels alone: pooling, or the mean over them."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POOLS)
    if node.op == "call_method" and node.target == "mean":
        axes = _argument(node, "dim")
        return axes in ((2, 3), [2, 3], (-2, -1), [-2, -1])
    return node.op == "call_function" and node.target in _POOL_CALLS


def drops_pixels(node: fx.Node) -> bool:
    """Whether the node is a mean that leaves [N, C]."""
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return node.op == "call_method" and node.target == "mean" and not keeps


def is_flatten(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node lays out each channel's pixels one after the other, channel by channel."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    is_call = node.op == "call_function" and node.target is torch.flatten
    is_call = is_call or (node.op == "call_method" and node.target == "flatten")
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return bool(is_call and _argument(node, "start_dim") == 1 and end == -1)


def is_dropout(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is an identity but for chance."""
    kinds = (nn.Dropout, nn.Dropout2d, nn.Identity)
    return node.op == "call_module" and isinstance(modules[str(node.target)], kinds)


def is_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node has weights of its own, by channel."""
    return node.op == "call_module" and isinstance(
        modules[str(node.target)], nn.Conv2d | nn.Linear | nn.BatchNorm2d
    )


def is_mixing(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether each output of the node reads every channel of its input."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def is_cat(node: fx.Node) -> bool:
    """Whether the node lines up the channels of several activations."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return axis in (1, -3) and isinstance(node.args[0], list | tuple)


def reads_batch(node: fx.Node) -> bool:
    """Whether the node is x.size(0) or x.shape[0]."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, place = node.args
        return isinstance(source, fx.Node) and reads_shape(source) and bool(place == 0)
    return node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)


def reads_shape(node: fx.Node) -> bool:
    """Whether the node is x.shape, of which nothing but x.shape[0] is read."""
    is_shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    return is_shape and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def is_flattening_view(node: fx.Node) -> bool:
    """Whether the node is x.view(x.size(0), -1), or reshape, or with x.shape[0]."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or len(node.args) != 3:
        return False
    first = node.args[1]
    return bool(isinstance(first, fx.Node) and reads_batch(first) and node.args[2] == -1)


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node writes over its first input."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return bool(node.target in _IN_PLACE or node.kwargs.get("inplace", False))


def _argument(node: fx.Node, name: str) -> Any:
    """What a call was given after the activation."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name)
