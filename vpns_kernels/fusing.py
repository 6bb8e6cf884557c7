"""What follows a convolution at inference can become part of it: batch norm, residual add, ReLU or ReLU6.

On the graph that torch.fx traces. A step is taken in only where nothing else reads what lies between, and a
residual only where both sides of the add have one shape for inputs of every size; all else stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from vpns_kernels.folding import fold_batch_norm
from vpns_kernels.formats import unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.graph_nodes import is_add, is_pointwise
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

_ACT_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6",
}  # fmt: skip
_ACT_METHODS = {"relu": "relu", "relu_": "relu"}
# Node that a size comes from, channels, and per strided layer and axis (2 · padding - reach, stride).
_Shape = tuple[fx.Node, int | None, tuple[tuple[int, int], ...]]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode whose convolutions do in one pass what follows them.

    Batch norms are folded into sparse and dense convolutions; sparse ones also take a residual and an
    activation, sparse linear layers an activation. Outputs are equal but for rounding: cast to bfloat16 or
    float16 afterwards, so that folded weights are rounded once.

    Returns:
        A torch.fx.GraphModule; a plain copy where torch.fx cannot trace the network.

    Raises:
        ValueError: a module in training mode, whose batch norm would not be what is folded.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> from vpns_kernels.convert import sparsify
        >>> kept = torch.ones(4, 3, 1, 1, dtype=torch.bool)
        >>> print(*fuse(sparsify(network, {"0": kept})).children())
        SparseConv2d([4, 3, 1, 1], unstructured, density=1.000, stride=(1, 1), act=relu)
    """
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(f"fuse: expected evaluation mode, got training at {training[0]!r} (call .eval())")
    model = copy.deepcopy(model)
    traced = _trace(model)
    if traced is None:
        return model
    fuser = _Fuser(traced)
    for node in list(traced.graph.nodes):
        fuser.extend(node)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    # The containers that torch.fx makes anew are in training mode.
    return traced.eval()


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
    """Keeps sparse layers whole, and what is watched by hooks, which run at each call."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_whole = isinstance(m, SparseConv2d | SparseLinear) or _has_hooks(m)
        return is_whole or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.GraphModule | None:
    # Tracing takes an optional argument for one that is given, and would follow the wrong branch.
    arguments = inspect.signature(model.forward).parameters.values()
    is_plain = all(
        a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments
    )
    tracer = _Tracer()
    if not is_plain or _has_hooks(model) or tracer.is_leaf_module(model, ""):
        return None
    try:
        graph = tracer.trace(model)
    except (RuntimeError, TypeError, ValueError):
        # A forward that branches on data, or hands activations to code that takes tensors only.
        return None
    return fx.GraphModule(model, graph, type(model).__name__)


class _Fuser:
    """Rewrites one traced network; a layer stays at its place in the order and takes in what follows."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._traced = traced
        self._modules = dict(traced.named_modules())
        targets = [str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
        # Whose weights something else reads, another call or the network itself, keep them.
        self._is_called_once = {
            name: targets.count(name) == 1 and not any(t.startswith(f"{name}.") for t in targets)
            for name in set(targets)
        }
        self._shapes = self._find_shapes()

    def extend(self, node: fx.Node) -> None:
        """Take into this node, where it is a convolution or linear layer, what follows it."""
        layer = self._module(node)
        if type(layer) not in (nn.Conv2d, SparseConv2d, SparseLinear) or not self._is_free(node):
            return
        if isinstance(layer, nn.Conv2d | SparseConv2d):
            self._fold_batch_norm(node)
        if isinstance(layer, SparseConv2d):
            self._take_residual(node)
        if isinstance(layer, SparseConv2d | SparseLinear):
            self._take_activation(node)

    def _fold_batch_norm(self, node: fx.Node) -> None:
        layer, follower = self._module(node), _only_user(node)
        bn = None if follower is None else self._module(follower)
        if follower is None or type(bn) is not nn.BatchNorm2d or not self._is_free(follower):
            return
        if bn.running_mean is None or len(node.args) != 1:
            return
        if isinstance(layer, SparseConv2d):
            if layer.act != "none":
                return
            folded: nn.Module = _fold_sparse(layer, bn)
        else:
            assert isinstance(layer, nn.Conv2d)
            folded = fold_batch_norm(layer, bn)
        self._replace_module(node, folded)
        self._drop(follower, node)

    def _take_residual(self, node: fx.Node) -> None:
        layer, add = self._module(node), _only_user(node)
        assert isinstance(layer, SparseConv2d)
        # Right behind the layer: nothing can have changed either side in place meanwhile.
        if add is None or add is not node.next or not is_add(add) or len(node.args) != 1:
            return
        if layer.act != "none" or len(add.args) != 2 or add.kwargs or len(add.all_input_nodes) != 2:
            return
        (residual,) = (source for source in add.all_input_nodes if source is not node)
        is_in_place = add.target in (operator.iadd, "add_") and add.args[0] is residual
        if is_in_place and not (_only_user(residual) is add and self._makes_tensor(residual)):
            return
        if self._shapes[node] != self._shapes[residual]:
            return
        node.args = (*node.args, residual)
        self._drop(add, node)

    def _take_activation(self, node: fx.Node) -> None:
        layer, follower = self._module(node), _only_user(node)
        assert isinstance(layer, SparseConv2d | SparseLinear)
        act = None if follower is None else self._activation(follower)
        if follower is not None and act is not None and layer.act == "none":
            layer.act = act
            self._drop(follower, node)

    def _activation(self, node: fx.Node) -> str | None:
        if node.op == "call_module":
            module = self._module(node)
            return None if module is None or _has_hooks(module) else _ACT_MODULES.get(type(module))
        if len(node.all_input_nodes) != 1:
            return None
        table = {"call_function": _ACT_FUNCTIONS, "call_method": _ACT_METHODS}.get(node.op, {})
        return table.get(node.target)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _is_free(self, node: fx.Node) -> bool:
        """Whether this call is the only one of its module, with the activation alone."""
        module = self._module(node)
        is_plain = len(node.args) >= 1 and not node.kwargs and module is not None and not _has_hooks(module)
        return is_plain and self._is_called_once[str(node.target)]

    def _makes_tensor(self, node: fx.Node) -> bool:
        """Whether the output shares memory with no other activation."""
        return isinstance(self._module(node), nn.Conv2d | nn.BatchNorm2d | SparseConv2d)

    def _replace_module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        self._traced.set_submodule(name, module)
        self._modules[name] = module

    def _drop(self, follower: fx.Node, node: fx.Node) -> None:
        follower.replace_all_uses_with(node)
        self._traced.graph.erase_node(follower)

    def _find_shapes(self) -> dict[fx.Node, _Shape]:
        """Equal ones mean equal sizes (and types) of two activations, whatever the network is given."""
        nodes = list(self._traced.graph.nodes)
        geometries = {node: found for node in nodes if (found := self._geometry(node)) is not None}
        channels = {node.all_input_nodes[0]: g.in_channels for node, g in geometries.items()}
        shapes: dict[fx.Node, _Shape] = {}
        for node in nodes:
            sources = [shapes[source] for source in node.all_input_nodes]
            if node in geometries:
                geometry, (root, _, strides) = geometries[node], sources[0]
                shapes[node] = (root, geometry.out_channels, strides + _strides(geometry))
            elif sources and is_pointwise(node, self._modules) and len(set(sources)) == 1:
                shapes[node] = sources[0]
            else:
                shapes[node] = (node, channels.get(node), ())
        return shapes

    def _geometry(self, node: fx.Node) -> ConvGeometry | None:
        layer = self._module(node)
        if isinstance(layer, SparseConv2d):
            return layer.geometry
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
            return ConvGeometry.from_module(layer) if layer.padding_mode == "zeros" else None
        return None


def _fold_sparse(layer: SparseConv2d, bn: nn.BatchNorm2d) -> SparseConv2d:
    kept = unpack(torch.ones_like(layer.values), layer.layout, layer.geometry) != 0
    return SparseConv2d.from_dense(
        layer.to_dense(), kept, layer.pattern, layer.values.dtype, layer.kernel, bn=bn
    )


def _strides(geometry: ConvGeometry) -> tuple[tuple[int, int], ...]:
    """What the layer does to height and width, floor((n + first) / second) + 1; empty where nothing."""
    g = geometry
    steps = tuple(
        (2 * g.padding[axis] - g.dilation[axis] * (g.kernel_size[axis] - 1) - 1, g.stride[axis])
        for axis in (0, 1)
    )
    return () if steps == ((-1, 1), (-1, 1)) else steps


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
