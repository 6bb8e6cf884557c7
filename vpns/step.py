"""What is one update? The paper's algorithm, from a batch to the next mask (section 3, both stages)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from vpns.batches import Batch
from vpns.group import ALONE, Group
from vpns.label_map import LabelMap
from vpns.predictor import Predictor
from vpns_kernels.refresh import Refresh


@dataclass(frozen=True, eq=False)
class Learner:
    """What an update acts on.

    Args:
        optimizer: holds what the stage trains: scores and prompt in search, weights and prompt in tune.
        refresh: makes the mask follow the scores; does nothing, and returns None, where the mask is fixed.
        group: the processes that learn together; one by default.
    """

    predictor: Predictor
    label_map: LabelMap
    optimizer: Optimizer
    refresh: Callable[[], Refresh | None]
    group: Group = ALONE


def train_step(learner: Learner, parts: Sequence[Batch]) -> tuple[float, int]:
    """One update, by the mean loss over the images of all parts of a batch, one after the other.

    Returns:
        That loss, and how many of the images were right.
    """
    count = sum(len(part.labels) for part in parts)
    total, right = 0.0, 0.0
    learner.optimizer.zero_grad(set_to_none=True)
    for part in map(learner.group.share, parts):
        logits = learner.label_map(learner.predictor(part.images, part.prompted))
        loss = F.cross_entropy(logits, part.labels, reduction="sum") / count
        # The one look at results: from here on a GPU has work while the next batch is made.
        seen, hits = torch.stack([loss.detach(), (logits.argmax(1) == part.labels).sum()]).tolist()
        _expect_finite(seen, "loss")
        loss.backward()
        total, right = total + seen, right + hits
    learner.group.add_gradients(learner.predictor.parameters())
    learner.optimizer.step()
    learner.refresh()
    total, right = learner.group.add(total, right)
    return total, int(right)


@torch.no_grad()
def predict_logits(predictor: Predictor, label_map: LabelMap, batches: Iterable[Batch]) -> Tensor:
    """Logits [N, classes] of the target classes, in the network's present mode."""
    logits = torch.cat([label_map(predictor(batch.images, batch.prompted)) for batch in batches])
    _expect_finite(logits.sum().item(), "logits")
    return logits


def _expect_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"expected finite {what}, got {value} (a lower learning rate may help)")
