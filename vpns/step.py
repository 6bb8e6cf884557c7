"""What is one update? The paper's algorithm, from a batch to the next mask (section 3, both stages)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from vpns.batches import Batch
from vpns.label_map import LabelMap
from vpns.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Learner:
    """What an update acts on.

    Args:
        optimizer: holds what the stage trains: scores and prompt in search, weights and prompt in tune.
        refresh: makes the mask follow the scores; does nothing where the mask is fixed.
    """

    prompt: Prompt
    network: nn.Module
    label_map: LabelMap
    optimizer: Optimizer
    refresh: Callable[[], object]


def train_step(learner: Learner, batch: Batch) -> tuple[float, int]:
    """One update; returns the batch's mean loss and how many of its images were right."""
    images = learner.prompt(batch.images, batch.prompted)
    logits = learner.label_map(learner.network(images))
    loss = F.cross_entropy(logits, batch.labels)
    _expect_finite(loss.item(), "loss")
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learner.optimizer.step()
    learner.refresh()
    return loss.item(), int((logits.argmax(1) == batch.labels).sum())


@torch.no_grad()
def predict_logits(
    prompt: Prompt, network: nn.Module, label_map: LabelMap, batches: Iterable[Batch]
) -> Tensor:
    """Logits [N, classes] of the target classes, in the network's present mode."""
    logits = torch.cat([label_map(network(prompt(batch.images, batch.prompted))) for batch in batches])
    _expect_finite(logits.sum().item(), "logits")
    return logits


def _expect_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"expected finite {what}, got {value} (a lower learning rate may help)")
