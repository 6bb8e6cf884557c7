"""What is a model? What a registered architecture or a user's factory builds for a number of classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vpns.config import ModelConfig
from vpns.models.factory import call_factory
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
    if config.name not in MODELS and ":" not in config.name:
        raise ValueError(
            f"build_model: expected model.name in {sorted(MODELS)} or 'module:factory', got {config.name!r}"
        )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        if config.name in MODELS:
            model = MODELS[config.name](num_classes)
        else:
            model = call_factory(config.name, num_classes)
    if config.weights is not None:
        load_weights(model, config.weights, config.name)
    return model
