"""Which optimizer does a stage use, how fast, and how is it saved? By parameter name, as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vpns.config import StageConfig


def build_optimizer(
    settings: StageConfig, main: Iterable[nn.Parameter], prompt: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """One optimizer with a group for the stage's own parameters and one for the prompt's that learn."""
    prompt_lr = settings.lr if settings.prompt_lr is None else settings.prompt_lr
    learned = [parameter for parameter in prompt if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(main), "lr": settings.lr, "base_lr": settings.lr}]
    if learned:
        groups.append({"params": learned, "lr": prompt_lr, "base_lr": prompt_lr})
    # On the CPU torch by itself goes over all tensors once for each operation: Adam takes six times as long.
    fused = True if all(p.is_cpu for group in groups for p in group["params"]) else None
    decay = settings.weight_decay
    optimizer: Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, weight_decay=decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=fused)
    if fused:
        optimizer.register_step_pre_hook(_lay_out_gradients)
        optimizer.register_step_post_hook(_count_change)
    return optimizer


def _lay_out_gradients(optimizer: Optimizer, *_: Any) -> None:
    """Fused steps go over memory as it lies: a gradient in another order would reach other weights."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def _count_change(optimizer: Optimizer, *_: Any) -> None:
    """Fused steps leave a tensor's version as it was, by which others know that it changed."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def set_learning_rate(optimizer: Optimizer, schedule: str, epoch: int, epochs: int) -> None:
    """Give every group its rate for an epoch: a function of the position, so that a resume needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_frac(schedule, epoch, epochs)


def learning_rate_frac(schedule: str, epoch: int, epochs: int) -> float:
    """What part of the base rate an epoch uses, as published: cosine to 0, or a tenth at 50 % and at 72 %."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "multistep":
        return float(0.1 ** ((epoch >= int(0.5 * epochs)) + (epoch >= int(0.72 * epochs))))
    return 1.0


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>:<what>": tensor.

    Args:
        parameters: by name, those that the optimizer holds among them.
    """
    return {
        f"{name}:{what}": value
        for name, parameter in parameters.items()
        for what, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of optimizer_tensors, on a fresh optimizer."""
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(":")
        parameter = parameters[name]
        # Adam's step counter stays where torch keeps it, on the CPU; the rest takes the parameter's strides,
        # because another memory order could round otherwise.
        is_like = tensor.shape == parameter.shape and tensor.ndim > 0
        value = torch.empty_like(parameter).copy_(tensor) if is_like else tensor
        optimizer.state[parameter][what] = value.detach()
