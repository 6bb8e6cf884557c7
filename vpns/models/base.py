"""What is a model? What a registered architecture or a user's factory builds for a number of classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vpns.config import ModelConfig
from vpns.models.factory import call_factory
from vpns.models.published import build_published, split_name
from vpns.models.weights import load_weights

Architecture = Callable[[int], nn.Module]
MODELS: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Function decorator: makes an architecture known under the function's name."""
    MODELS[architecture.__name__] = architecture
    return architecture


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """The network that the configuration names, with its weights, or with a start drawn from the seed."""
    if num_classes < 1:
        raise ValueError(f"build_model: expected num_classes >= 1, got {num_classes}")
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        if config.name in MODELS:
            model = MODELS[config.name](num_classes)
        elif ":" in split_name(config.name)[1]:
            model = call_factory(config.name, num_classes)
        else:
            model = build_published(config.name, num_classes)
    if config.weights is not None:
        load_weights(model, config.weights, config.name)
    return model
