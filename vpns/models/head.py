"""Which layer of a network names the classes? Its last linear layer; a new one can take its place."""

from __future__ import annotations

import torch
from torch import nn


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that is registered last."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"find_head: expected a model with a torch.nn.Linear, got {type(model).__name__}")
    return linears[-1]


def replace_head(model: nn.Module, num_classes: int, seed: int) -> nn.Module:
    """Put a new linear layer, started from the seed, in place of the head; to be done before masking."""
    name, head = find_head(model)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        fresh = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
    fresh = fresh.to(head.weight.device, head.weight.dtype)
    if not name:
        return fresh
    model.set_submodule(name, fresh)
    return model
