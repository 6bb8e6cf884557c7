"""How do a network's source classes answer for the target classes? By a choice of output columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LabelMap(nn.Module):
    """Takes one source logit per target class; without a sequence all logits pass.

    Args:
        sequence: int64 [target classes], the source class of each target class.
    """

    sequence: Tensor | None

    def __init__(self, sequence: Tensor | None = None) -> None:
        super().__init__()
        if sequence is not None and (sequence.dtype != torch.int64 or sequence.ndim != 1):
            raise ValueError(
                f"LabelMap: expected an int64 vector, got {sequence.dtype} {list(sequence.shape)}"
            )
        self.register_buffer("sequence", sequence)

    def forward(self, logits: Tensor) -> Tensor:
        """[N, source classes] -> [N, target classes]."""
        return logits if self.sequence is None else logits.index_select(1, self.sequence)


def identity_map(source_classes: int, target_classes: int) -> Tensor:
    """Target class t answered by source class t."""
    check_enough(source_classes, target_classes)
    return torch.arange(target_classes)


def frequency_map(counts: Tensor) -> Tensor:
    """Greedy one-to-one map: the largest count left is assigned, its source and its target are struck out.

    Args:
        counts: integers [source, target], as count_predictions returns them; among equal ones the lowest
            flat index goes first.

    Returns:
        int64 [target]: the source class of each target class.
    """
    if counts.ndim != 2 or counts.is_floating_point():
        raise ValueError(
            "frequency_map: expected integer counts [source, target], "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    source_classes, target_classes = counts.shape
    check_enough(source_classes, target_classes)
    left = counts.to("cpu", torch.int64, copy=True)
    sequence = torch.empty(target_classes, dtype=torch.int64)
    for _ in range(target_classes):
        # argmax gives the first of equal maxima.
        source, target = divmod(int(left.argmax()), target_classes)
        sequence[target] = source
        left[source, :] = -1
        left[:, target] = -1
    return sequence


def check_enough(source_classes: int, target_classes: int) -> None:
    """Refuse more target classes than there are source classes to answer for them."""
    if target_classes > source_classes:
        raise ValueError(
            f"label map: expected at most {source_classes} target classes, one source class for each, "
            f"got {target_classes} (label_map.kind=head gives the network a new head)"
        )


@torch.no_grad()
def count_predictions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], target_classes: int
) -> Tensor:
    """How often does the model, in eval mode, see each source class in the images of each target class?

    Args:
        batches: network inputs [N, ...] (prompted and normalised where the run does so) and labels [N].

    Returns:
        int64 [source, target] on the CPU.
    """
    counts: Tensor | None = None
    with _eval_mode(model):
        for images, labels in batches:
            logits = model(images)
            source_classes = logits.shape[1]
            cells = logits.argmax(1) * target_classes + labels
            seen = torch.bincount(cells, minlength=source_classes * target_classes).cpu()
            seen = seen.reshape(source_classes, target_classes)
            counts = seen if counts is None else counts + seen
    if counts is None:
        raise ValueError("count_predictions: expected at least one batch, got none")
    return counts


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
