"""How does a batch norm in evaluation mode disappear? Into the weight and bias of the layer before it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

_Layer = TypeVar("_Layer", bound=nn.Conv2d | nn.Linear)


@torch.no_grad()
def fold_batch_norm(layer: _Layer, bn: nn.BatchNorm1d | nn.BatchNorm2d) -> _Layer:
    """A copy of the layer that gives what the layer and then its batch norm, in evaluation mode, give.

    Computed in float64 and rounded once; zeros of the weight stay zeros.

    Raises:
        ValueError: a batch norm without running statistics, in training mode, or of other channels.
    """
    channels = layer.weight.shape[0]
    if bn.num_features != channels:
        raise ValueError(f"fold_batch_norm: expected {channels} channels, got {bn.num_features}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_batch_norm: expected running statistics, got none")
    if bn.training:
        raise ValueError("fold_batch_norm: expected evaluation mode, got training (call bn.eval() first)")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    bias = -bn.running_mean.double() * scale
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale
    if bn.bias is not None:
        bias = bias + bn.bias.double()
    weight = layer.weight.double() * scale.view(-1, *(1 for _ in layer.weight.shape[1:]))
    folded = copy.deepcopy(layer)
    folded.weight.copy_(weight)
    folded.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    return folded
