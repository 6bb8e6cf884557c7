"""How does a network get its scores and masks?

A score starts from the weights of its unit. A unit of one weight takes the weight's own value (HYDRA's start
keeps the sign). A block or a channel takes the rank of its mean magnitude within its layer (stream): means of
many weights differ far less within a layer than between layers, so that one threshold over their values would
keep some layers whole and empty others before search begins; by rank every layer begins with its share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vpns_kernels.channels import trace_streams
from vpns_kernels.convert import mask_layers, mask_modules, stream_name, weight_masks
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.refresh import Refresh, refresh_mask

Weigh = Callable[[Tensor], Tensor]


def attach_masks(network: nn.Module, pattern: Pattern, scores: Mapping[str, Tensor]) -> nn.Module:
    """The network with masks and these scores; its own parameters are frozen, as search wants them."""
    network.requires_grad_(False)
    masked = mask_layers(network, pattern)
    with torch.no_grad():
        for name, module in mask_modules(masked).items():
            module.scores.copy_(scores[name])
    return masked


def unit_scores(network: nn.Module, pattern: Pattern, weigh: Weigh) -> dict[str, Tensor]:
    """Start scores by name of the module that will carry them, from the weights of a plain network.

    Args:
        weigh: what a single weight counts, of a whole layer's weight at a time.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    values = {name: weigh(layer.weight.detach()) for name, layer in layers.items()}
    if not isinstance(pattern, Channel):
        return {name: _weigh_units(value, pattern) for name, value in values.items()}
    _, streams = trace_streams(network)
    scores = {}
    for number, stream in enumerate(streams):
        made = torch.stack([values[name].abs().flatten(1).mean(1) for name in stream.producers]).mean(0)
        scores[stream_name(number)] = rank(made)
    return scores


def refresh(
    network: nn.Module, pattern: Pattern, density: float, rule: Literal["exact", "published"]
) -> Refresh:
    """Make the masks follow the scores."""
    modules = mask_modules(network).values()
    scores = [module.scores for module in modules]
    try:
        chosen = refresh_mask(scores, pattern, density, rule)
    except ValueError as error:
        if any(bool(tensor.isnan().any()) for tensor in scores):
            message = "expected finite scores, got NaN (a lower learning rate may help)"
            raise FloatingPointError(message) from error
        raise
    for module, mask in zip(modules, chosen.masks, strict=True):
        module.mask.copy_(mask)
    return chosen


def describe_masks(network: nn.Module) -> list[dict[str, Any]]:
    """One row per masked weight: its layer, shape, kept weights and their share."""
    return [
        {
            "layer": name,
            "shape": list(mask.shape),
            "weights": mask.numel(),
            "kept": int(mask.sum()),
            "weight_density": float(mask.double().mean()),
        }
        for name, mask in weight_masks(network).items()
    ]


def _weigh_units(values: Tensor, pattern: Pattern) -> Tensor:
    sizes = pattern.reduce_sum(torch.ones_like(values))
    if sizes.shape == values.shape:
        return values
    return rank(pattern.reduce_sum(values.abs()) / sizes)


def rank(values: Tensor) -> Tensor:
    """Where each value stands among all of them, in (0, 1); the earlier of two equals stands lower."""
    places = values.flatten().argsort(stable=True).argsort()
    return ((places + 0.5) / values.numel()).to(values.dtype).view_as(values)
