"""What is a pruning method? How scores start, whether they are learned, and whether a prompt helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpns.masking import unit_scores
from vpns_kernels.patterns import Channel, Pattern


@dataclass(frozen=True, eq=False)
class Start:
    """What start scores may be made from.

    Args:
        pretrained: the network before the task.
        fine_tuned: the dense network after it, for methods that need it.
    """

    pretrained: nn.Module
    fine_tuned: nn.Module | None
    pattern: Pattern
    seed: int


@dataclass(frozen=True)
class Method:
    """A strategy.

    Args:
        start_scores: scores by name of the module that carries them.
        learns_scores: whether search trains them, or the first mask is the last.
        is_prompted: whether the configured prompt is used; otherwise images fill the canvas.
        needs_fine_tuned: whether the dense network must have been fine-tuned first.
    """

    name: str
    start_scores: Callable[[Start], dict[str, Tensor]]
    learns_scores: bool
    is_prompted: bool
    needs_fine_tuned: bool = False


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known under its name."""
    METHODS[method.name] = method
    return method


def find_method(name: str) -> Method:
    """The method of that name."""
    if name not in METHODS:
        raise ValueError(f"find_method: expected method in {sorted(METHODS)}, got {name!r}")
    return METHODS[name]


def expect_channels(method: str, pattern: Pattern) -> None:
    """Refuse what only prunes whole channels another pattern."""
    if not isinstance(pattern, Channel):
        raise ValueError(f"method {method}: expected pattern channel, got {pattern}")


def scaled_start(start: Start) -> dict[str, Tensor]:
    """HYDRA's scaled start: S = sqrt(6 / fan_in) · W / max|W| in each layer."""
    return unit_scores(start.pretrained, start.pattern, _scale)


def _scale(weight: Tensor) -> Tensor:
    fan_in = weight[0].numel()
    # A layer of zeros keeps them, instead of becoming NaN.
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    bound = math.sqrt(6 / fan_in)
    return weight * (bound / largest)
