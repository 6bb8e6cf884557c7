"""In training, a batch norm can do in its own passes what follows it: residual add, ReLU or ReLU6.

Batch norm reads and writes whole activations, and so does each step after it; where convolutions are sparse
this is most of what remains of a training step.
"""

from __future__ import annotations

import operator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vpns_kernels.graph_nodes import is_add
from vpns_kernels.ops.batch_norm_act import batch_norm_act
from vpns_kernels.tracing import find_activation, find_single_calls, has_hooks, only_user

_ACTS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}


class BatchNormAct2d(nn.BatchNorm2d):
    """act(batch_norm(x) + residual), [N, C, H, W]; parameters and running statistics as nn.BatchNorm2d.

    Args:
        act: "none", "relu" or "relu6".
    """

    act: str = "none"

    @classmethod
    def from_batch_norm(cls, bn: nn.BatchNorm2d, act: str = "none") -> Self:
        """The twin of a batch norm, over the very same parameters and buffers."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        # The dictionaries of tensors too: who trains or loads one does so to the other. Hooks stay behind.
        shared = ("_parameters", "_buffers", "_non_persistent_buffers_set")
        own = bn.__dict__.items()
        twin.__dict__.update({key: value for key, value in own if key in shared or not key.startswith("_")})
        twin.act = act
        return twin

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise x [N, C, H, W], add the residual, apply the activation; [N, C, H, W] in the dtype of x.

        Statistics are the batch's own in training mode and the running ones in evaluation mode.

        Args:
            residual: [N, C, H, W], or None.
        """
        fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        if not self.training or not self.affine or not fits:
            y = super().forward(x)
            result: Tensor = _ACTS[self.act](y if residual is None else y + residual)
            return result
        y, mean, variance = batch_norm_act(x, self.weight, self.bias, self.eps, residual, self.act)
        if self.track_running_stats:
            self._follow(mean, variance, x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards this batch's, of `count` values per channel."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype) * (count / (count - 1)), share)

    def extra_repr(self) -> str:
        """The sizes of the batch norm, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"  # type: ignore[no-untyped-call]


def fuse_batch_norms(traced: fx.GraphModule) -> list[str]:
    """Let the batch norms of a traced network take in the residual add and the activation that follow them.

    In place; the network it was traced from stays as it is and shares all tensors. A step is taken in only
    where nothing else reads what lies between.

    Returns:
        The names of the batch norms.

    Example:
        >>> from vpns_kernels.tracing import trace
        >>> traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
        >>> fuse_batch_norms(traced), traced.get_submodule("1").act
        (['1'], 'relu')
    """
    _drop_identities(traced)
    modules, called_once = dict(traced.named_modules()), find_single_calls(traced)
    fused = []
    for node in list(traced.graph.nodes):
        bn = modules.get(str(node.target)) if node.op == "call_module" else None
        is_plain = len(node.args) == 1 and not node.kwargs and str(node.target) in called_once
        if type(bn) is not nn.BatchNorm2d or has_hooks(bn) or not is_plain:
            continue
        twin = BatchNormAct2d.from_batch_norm(bn)
        traced.set_submodule(str(node.target), twin)
        node = _take_residual(traced.graph, node)
        follower = only_user(node)
        act = None if follower is None else find_activation(follower, modules)
        if follower is not None and act is not None:
            twin.act = act
            follower.replace_all_uses_with(node)
            traced.graph.erase_node(follower)
        fused.append(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return fused


def _drop_identities(traced: fx.GraphModule) -> None:
    """What does nothing would stand between a batch norm and what follows it."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Identity and not has_hooks(module) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _take_residual(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The batch norm's call with what is added to it as its residual, or as it was."""
    add = only_user(node)
    if add is None or not is_add(add) or len(add.args) != 2 or add.kwargs or len(add.all_input_nodes) != 2:
        return node
    (residual,) = (source for source in add.all_input_nodes if source is not node)
    # residual += batch norm changes the residual for whoever else reads it.
    is_in_place: Any = add.target in (operator.iadd, "add_")
    if is_in_place and add.args[0] is residual and only_user(residual) is not add:
        return node
    with graph.inserting_before(add):
        call = graph.call_module(str(node.target), (*node.args, residual))
    add.replace_all_uses_with(call)
    graph.erase_node(add)
    graph.erase_node(node)
    return call
