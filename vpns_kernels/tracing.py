"""How is a network traced into a graph that may be rewritten?

By torch.fx, with this library's own layers kept whole, and with what a rewriting must not lose: hooks,
optional arguments and in-place operations.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_ACT_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6",
}  # fmt: skip
_ACT_METHODS = {"relu": "relu", "relu_": "relu"}


def check_evaluating(who: str, model: nn.Module) -> None:
    """Refuse a network in training mode, where batch norms and dropout are not what they are in use."""
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"layer {training[0]!r}" if training[0] else "the network itself"
        raise ValueError(f"{who}: expected evaluation mode, got {where} in training mode (call .eval())")


def trace(model: nn.Module) -> fx.GraphModule | None:
    """The graph over the very same layers; None where torch.fx cannot trace the network."""
    # Tracing takes an optional argument for one that is given, and would follow the wrong branch.
    arguments = inspect.signature(model.forward).parameters.values()
    is_plain = all(
        a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments
    )
    tracer = _Tracer()
    if not is_plain or has_hooks(model) or tracer.is_leaf_module(model, ""):
        return None
    try:
        graph = tracer.trace(model)
    except (RuntimeError, TypeError, ValueError):
        # A forward that branches on data, or hands activations to code that takes tensors only.
        return None
    return fx.GraphModule(model, graph, type(model).__name__)


def find_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the activation that a node is, as the ops have it; None for anything else."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if has_hooks(module) else _ACT_MODULES.get(type(module))
    if len(node.all_input_nodes) != 1:
        return None
    table = {"call_function": _ACT_FUNCTIONS, "call_method": _ACT_METHODS}.get(node.op, {})
    return table.get(node.target)


def find_single_calls(traced: fx.GraphModule) -> set[str]:
    """Names of the modules that are called once, and whose tensors nothing else reads."""
    targets = [str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    return {
        name
        for name in set(targets)
        if targets.count(name) == 1 and not any(target.startswith(f"{name}.") for target in targets)
    }


def only_user(node: fx.Node) -> fx.Node | None:
    """Who alone reads a node."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Proxy(fx.Proxy):
    """Keeps x += y what it is: tracing by itself makes it x = x + y, which other names of x would not see."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Keeps this library's layers whole, and what is watched by hooks, which run at each call."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_own = type(m).__module__.partition(".")[0] == __name__.partition(".")[0]
        return is_own or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)
