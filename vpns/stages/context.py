"""What does every stage share? The run's folder, settings, images, finished stages and observers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vpns.config import RunConfig
from vpns.data import ImageSet, load_data
from vpns.group import ALONE, Group
from vpns.metrics import MetricsLog
from vpns.observe import Observer
from vpns.state import StageRecord


def check_device(device: str) -> None:
    """Refuse before any work what torch cannot compute on.

    Raises:
        ValueError: torch has no such device; says why.
    """
    try:
        torch.empty(0, device=device)
    # A torch without CUDA asserts.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"run: expected a device that torch has, got {device!r} ({error})") from error


@dataclass
class Context:
    """A run while it works.

    Args:
        finished: the record of each stage that is done, by name.
        group: the processes that train this run together, this one among them.
        checks: whether search and tune first compare their kernels with the reference.
    """

    folder: Path
    config: RunConfig
    observers: Sequence[Observer] = ()
    finished: dict[str, StageRecord] = field(default_factory=dict)
    group: Group = ALONE
    checks: bool = False

    @cached_property
    def images(self) -> ImageSet:
        """The target task, loaded when a stage first needs it."""
        return load_data(self.config.data, self.config.seed, self.config.prompt.canvas)

    @cached_property
    def metrics(self) -> MetricsLog:
        """The run's metrics."""
        return MetricsLog(self.folder)

    @property
    def device(self) -> torch.device:
        """Where torch computes."""
        return torch.device(self.config.device)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.folder / stage


@dataclass(frozen=True)
class Stage:
    """One idempotent stage.

    Args:
        run: writes the stage's outputs into its folder and returns plain values for its record.
        needs: stages that must have finished.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...] = ()
