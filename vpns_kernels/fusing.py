"""What follows a convolution at inference can become part of it: batch norm, residual add, ReLU or ReLU6.

On the graph that torch.fx traces. A step is taken in only where nothing else reads what lies between, and a
residual only where both sides of the add have one shape for inputs of every size; all else stays as it is.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from vpns_kernels.copying import copy_network
from vpns_kernels.folding import fold_batch_norm
from vpns_kernels.formats import unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.graph_nodes import is_add, is_pointwise
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear
from vpns_kernels.tracing import (
    check_evaluating,
    find_activation,
    find_single_calls,
    has_hooks,
    only_user,
    trace,
)

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
    check_evaluating("fuse", model)
    model = copy_network(model)
    traced = trace(model)
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


class _Fuser:
    """Rewrites one traced network; a layer stays at its place in the order and takes in what follows."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._traced = traced
        self._modules = dict(traced.named_modules())
        # Whose weights something else reads, another call or the network itself, keep them.
        self._called_once = find_single_calls(traced)
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
        layer, follower = self._module(node), only_user(node)
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
        layer, add = self._module(node), only_user(node)
        assert isinstance(layer, SparseConv2d)
        # Right behind the layer: nothing can have changed either side in place meanwhile.
        if add is None or add is not node.next or not is_add(add) or len(node.args) != 1:
            return
        if layer.act != "none" or len(add.args) != 2 or add.kwargs or len(add.all_input_nodes) != 2:
            return
        (residual,) = (source for source in add.all_input_nodes if source is not node)
        is_in_place = add.target in (operator.iadd, "add_") and add.args[0] is residual
        if is_in_place and not (only_user(residual) is add and self._makes_tensor(residual)):
            return
        if self._shapes[node] != self._shapes[residual]:
            return
        node.args = (*node.args, residual)
        self._drop(add, node)

    def _take_activation(self, node: fx.Node) -> None:
        layer, follower = self._module(node), only_user(node)
        assert isinstance(layer, SparseConv2d | SparseLinear)
        act = None if follower is None else find_activation(follower, self._modules)
        if follower is not None and act is not None and layer.act == "none":
            layer.act = act
            self._drop(follower, node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _is_free(self, node: fx.Node) -> bool:
        """Whether this call is the only one of its module, with the activation alone."""
        module = self._module(node)
        is_plain = len(node.args) >= 1 and not node.kwargs and module is not None and not has_hooks(module)
        return is_plain and str(node.target) in self._called_once

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
