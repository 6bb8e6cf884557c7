"""Who trains a run together? The processes that torchrun started: each learns from its share of every batch.

Gradients are added up before the optimizers see them, so that weights, scores and with them the masks are the
same bits in every process. Batch norm sees a process's own images; its statistics are those of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vpns.batches import Batch


@dataclass(frozen=True)
class Group:
    """A process among those that train together; alone by default, where nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def share(self, batch: Batch) -> Batch:
        """This process's part of a batch; ValueError where there are not enough images for everybody."""
        if self.size == 1:
            return batch
        if len(batch.labels) < self.size:
            raise ValueError(
                f"Group.share: expected at least one image for each of {self.size} processes, "
                f"got a batch of {len(batch.labels)}"
            )
        return batch.split(self.size)[self.rank]

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of all processes; where one has none, others have none either."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def add(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return [float(number) for number in summed]

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Take floating tensors from the first process."""
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.size == 1 or not floating:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in floating])
        dist.broadcast(flat, 0)
        with torch.no_grad():
            for tensor, first in zip(floating, flat.split([t.numel() for t in floating]), strict=True):
                tensor.copy_(first.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Group()


@contextmanager
def join_group() -> Iterator[Group]:
    """The group that torchrun's environment describes, over gloo; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
