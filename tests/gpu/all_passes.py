"""Forward and gradients of every op that has Triton kernels, on a few of its cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.kernels.test_contract import can_run, run
from vpns_kernels import OPS
from vpns_kernels.ops.registry import Op

# What gradients are taken of, where an op has any.
LEARNED = {
    "sparse_conv2d": ("x", "values", "bias"),
    "masked_conv2d": ("x", "scores", "bias"),
    "kept_conv2d": ("x", "bias"),
    "channel_mask": ("x", "scores"),
    "batch_norm_act": ("x", "weight", "bias", "residual"),
    "prompt_conv2d": ("prompt", "weight", "bias"),
}
TRITON_OPS = [op for op in OPS.values() if "triton" in op.backends]


def make_passes(op: Op, device: torch.device, count: int) -> list[Callable[[], list[Tensor]]]:
    """The first `count` cases that are not empty and that the kernels take, each as all of its passes.

    Then the first whose products are of bfloat16, if none was: tensor cores take those another way.
    """
    found: list[Callable[[], list[Tensor]]] = []
    has_half = False
    for case in op.cases():
        args = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), case.build())
        leaves = tree_leaves(args)
        is_empty = any(leaf.numel() == 0 for leaf in leaves if isinstance(leaf, Tensor))
        is_half = any(getattr(leaf, "dtype", leaf) == torch.bfloat16 for leaf in leaves)
        is_wanted = len(found) < count or (is_half and not has_half)
        if is_wanted and not is_empty and can_run(op, args, "triton"):
            found.append(_passes(op, args))
            has_half |= is_half
    return found


def _passes(op: Op, args: dict[str, Any]) -> Callable[[], list[Tensor]]:
    learned = [args[name] for name in LEARNED.get(op.name, ()) if args.get(name) is not None]
    for tensor in learned:
        tensor.requires_grad_()

    def all_passes() -> list[Tensor]:
        results = [leaf for leaf in tree_leaves(run(op.name, args, "triton")) if isinstance(leaf, Tensor)]
        if learned:
            y = results[0]
            grad = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view(y.shape)
            results += torch.autograd.grad(y, learned, grad)
        return [result.detach() for result in results]

    return all_passes
