"""How is a network copied to be changed? Deeply, and with the masks of torch.nn.utils.prune applied."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Before each forward, from parameters of their own.
_COMPUTING_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy; masks of torch.nn.utils.prune are applied, and weights are parameters again."""
    # What prune computes, or a forward has left behind, has a history, which deepcopy refuses.
    held = [tensor for module in model.modules() for tensor in _find_tensors(vars(module))]
    known = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    copied = copy.deepcopy(model, known)
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return copied


def copy_hooks(layer: nn.Module, twin: nn.Module) -> None:
    """Give a layer's hooks to its twin, but those that compute the layer's own weight."""
    for name, hooks in vars(layer).items():
        if "_hooks" in name and isinstance(hooks, dict):
            kept = {key: hook for key, hook in hooks.items() if not isinstance(hook, _COMPUTING_HOOKS)}
            vars(twin)[name].update(kept)


def cast_floats(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself with its real numbers in another type; Module.to would halve complex ones, too."""
    cast: nn.Module = model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return cast


def _find_tensors(value: Any) -> Iterator[Tensor]:
    """In attributes, and in the containers that they are."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from _find_tensors(held)
