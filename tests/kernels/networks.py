"""Small networks of every kind that conversion has to follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem with pooling, two blocks (one with a shortcut of its own), the average, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)
        x = self.relu(self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x))))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution; the sum itself is never normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        x = F.adaptive_avg_pool2d(F.relu(self.bn3(x)), 1)
        return self.head(torch.flatten(x, 1))


def depthwise() -> nn.Module:
    """An inverted bottleneck: widen, depthwise, project."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def vgg() -> nn.Module:
    """No batch norm, pooling before and after ReLU, flatten over pixels, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 10, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(10 * 2 * 2, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def bare() -> nn.Module:
    """Convolutions that read one another with nothing between."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 5, 3))


class TwoReaders(nn.Module):
    """One activation that is read with and without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head((self.conv2(F.relu(x)) + self.conv3(x)).mean(dim=(2, 3)))


def grouped() -> nn.Module:
    """A grouped convolution: for weight patterns only."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual, "pre-activation": PreActivation, "depthwise": depthwise, "vgg": vgg, "bare": bare,
    "two readers": TwoReaders,
}  # fmt: skip
ALL = FOLLOWED | {"grouped": grouped}


def build(name: str) -> nn.Module:
    """The network with weights, running statistics and biases of no special value; float64."""
    torch.manual_seed(11)
    network = ALL[name]().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
    # Running statistics of these images, so that no channel is silent for all of them.
    network(images(8))
    return network


def images(count: int = 4) -> Tensor:
    """[count, 3, 8, 8] float64."""
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
