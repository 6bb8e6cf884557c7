"""Which networks are known by a name that is not our own? Those of torchvision and timm, where installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from vpns_kernels.torchvision_import import import_torchvision


def build_published(name: str, num_classes: int, seed: int = 0) -> nn.Module:
    """torchvision's network of this name, or else timm's, with a random start.

    Raises:
        ValueError: a name that none of those installed has.
    """
    looked_in = []
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        if find_spec("torchvision") is not None:
            looked_in.append("torchvision")
            models = import_torchvision("models")
            if name in models.list_models(models):
                network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
                return network
        if find_spec("timm") is not None:
            # timm imports torchvision, which may have to be told how.
            import_torchvision("models")
            import timm

            looked_in.append("timm")
            if timm.is_model(name):
                network = timm.create_model(name, pretrained=False, num_classes=num_classes)
                return network
    where = " and ".join(looked_in) or "nowhere: neither torchvision nor timm is installed"
    raise ValueError(
        "build_published: expected a network's name, 'module:factory', or the folder of a run or an "
        f"artifact, got {name!r} (looked in vpns.models, {where})"
    )
