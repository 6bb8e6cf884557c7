"""A run of a second: a network of a few weights on the digits, and ways to be killed in the midst of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpns.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    TuneConfig,
)
from vpns.state import save_state

CANVAS = 16


class Tiny(nn.Module):
    """Convolutions, batch norm, a residual add, dropout (which draws from torch's generator) and a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(first + self.bn2(self.conv2(first)))
        logits: Tensor = self.fc(self.drop(out.mean((2, 3))))
        return logits


def build(num_classes: int) -> nn.Module:
    """The factory of the configuration."""
    return Tiny(num_classes)


class Heavy(nn.Module):
    """Takes 4 MiB, and as much again, for each image that it trains on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1024, 1)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(x).exp().mean((2, 3)))
        return logits


def make_config(**changes: Any) -> RunConfig:
    """Settings of a tiny run, which does not last until a save is due."""
    settings: dict[str, Any] = {
        "data": DataConfig(train_count=60),
        "model": ModelConfig("tiny_task:build", source_classes=12),
        "prompt": PromptConfig(canvas=CANVAS, frame=2),
        "pattern": "unstructured",
        "density": 0.3,
        "pretrain": PretrainConfig(epochs=0),
        "search": SearchConfig(epochs=3, batch_size=20, lr=1e-2),
        "tune": TuneConfig(epochs=3, batch_size=20),
        "threads": 1,
        "save_every_s": 1000.0,
    }
    return RunConfig(**settings | changes)


def save_and_die(
    folder: Path, tensors: Mapping[str, Tensor], position: Mapping[str, Any], operation: int
) -> None:
    """Save a state, but be killed right before the given file operation of it."""
    seen = 0

    def die_at(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove"):
            seen += 1
            if seen > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_at)
    save_state(folder, tensors, position)


def linear(num_classes: int) -> nn.Module:
    """A network without convolutions."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * CANVAS * CANVAS, num_classes))


def wrong(num_classes: int) -> nn.Module:
    """A network that ignores the class count."""
    return Tiny(num_classes + 1)


def narrow(num_classes: int) -> nn.Module:
    """A network for images of another size."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, num_classes))
