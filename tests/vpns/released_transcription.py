"""What did the published code compute? Its formulas once more, alone: neither vpns nor vpns_kernels is here.

Written from the description of the algorithm: prompt, masked layers, scaled start, global threshold, the two
updates of an iteration, both stages and the label mapping. It is dense, slow and meant to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR


class _Step(torch.autograd.Function):
    """1 where the magnitude is above tau; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, tau: float) -> Tensor:
        return torch.where(magnitude > tau, 1.0, 0.0).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Released:
    """A network under the published algorithm, between any two of its updates.

    Args:
        state: torchvision's state dict of the pretrained network; every weight of a convolution or of a
            linear layer is masked, biases and batch norm are not.
        forward: the network, as a function of this object's layers and of an input.
        canvas, frame: side of the input and width of the prompt, in pixels.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        forward: Callable[[Released, Tensor], Tensor],
        canvas: int,
        frame: int,
        density: float,
    ) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.forward = forward
        self.density = density
        self.layers = [n.removesuffix(".weight") for n, t in state.items() if t.dim() > 1]
        self.scores = {name: scaled_start(self.state[f"{name}.weight"]) for name in self.layers}
        dtype = self.scores[self.layers[0]].dtype
        self.prompt = torch.zeros(3, canvas, canvas, dtype=dtype, requires_grad=True)
        self.frame_mask = torch.ones(1, canvas, canvas, dtype=dtype)
        self.frame_mask[:, frame : canvas - frame, frame : canvas - frame] = 0
        self.mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype).view(3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], dtype=dtype).view(3, 1, 1)
        self.training = True
        self.sequence: list[int] = []
        self.tau = 0.0
        self.update_tau()

    def update_tau(self) -> None:
        """tau = k-th smallest |S| of all layers together, k = int((1 - density) N); below 1 nothing moves."""
        magnitudes = torch.cat([scores.detach().abs().flatten() for scores in self.scores.values()])
        k = int((1 - self.density) * magnitudes.numel())
        if k >= 1:
            self.tau = float(torch.kthvalue(magnitudes, k).values)

    def masks(self) -> dict[str, Tensor]:
        """True = kept; what ties with tau is pruned."""
        return {name: scores.detach().abs() > self.tau for name, scores in self.scores.items()}

    # Layers

    def weight(self, name: str) -> Tensor:
        step: Tensor = _Step.apply(self.scores[name].abs(), self.tau)  # type: ignore[no-untyped-call]
        return self.state[f"{name}.weight"] * step

    def conv(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, self.weight(name), self.state.get(f"{name}.bias"), stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(name), self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, affine, shift = (
            self.state[f"{name}.{what}"] for what in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, affine, shift, self.training, 0.1, 1e-5)

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    # Prompt and label mapping

    def logits(self, images: Tensor, prompted: bool) -> Tensor:
        """Source logits of images [N, 3, canvas, canvas] in [0, 1]."""
        if prompted:
            images = (images + self.prompt * self.frame_mask).clamp(0, 1)
        return self.forward(self, (images - self.mean) / self.std)

    @torch.no_grad()
    def map_labels(self, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> None:
        """flm: the largest count (source, target) is assigned and its row and column struck, until done."""
        self.training = False
        counts: dict[tuple[int, int], int] = {}
        for images, labels in batches:
            logits = self.logits(images, prompted=True)
            for source, target in zip(logits.argmax(1).tolist(), labels.tolist(), strict=True):
                counts[source, target] = counts.get((source, target), 0) + 1
        cells = [(source, target) for source in range(logits.shape[1]) for target in range(classes)]
        # A stable sort: among equal counts the first cell of the matrix goes first.
        cells.sort(key=lambda cell: -counts.get(cell, 0))
        assigned: dict[int, int] = {}
        for source, target in cells:
            if target not in assigned and source not in assigned.values():
                assigned[target] = source
        self.sequence = [assigned[target] for target in range(classes)]
        self.training = True

    # Stages

    def begin_mask_finding(self, epochs: int) -> None:
        """Stage 1: Adam on the scores, Adam on the prompt; weights, biases and affine parts stand still."""
        for scores in self.scores.values():
            scores.requires_grad_(True)
        self._begin(
            Adam(self.scores.values(), lr=1e-4, weight_decay=1e-4),
            Adam([self.prompt], lr=1e-4, weight_decay=1e-4),
            epochs,
        )

    def begin_tuning(self, epochs: int) -> None:
        """Stage 2: SGD on weights, biases and affine parts, SGD on the prompt; scores and tau stand still."""
        for scores in self.scores.values():
            scores.requires_grad_(False)
            scores.grad = None
        self._begin(
            SGD(self.learned_in_tuning().values(), lr=1e-2, momentum=0.9, weight_decay=1e-4),
            SGD([self.prompt], lr=1e-2, momentum=0.9, weight_decay=1e-4),
            epochs,
        )

    def learned_in_tuning(self) -> dict[str, Tensor]:
        """Weights, biases and the affine parts of batch norm, ready for gradients."""
        return {n: t.requires_grad_(True) for n, t in self.state.items() if n.endswith(("weight", "bias"))}

    def _begin(self, main: Optimizer, prompt: Optimizer, epochs: int) -> None:
        self.optimizers = (main, prompt)
        self.schedules = [CosineAnnealingLR(optimizer, epochs) for optimizer in self.optimizers]
        self.finds_mask = isinstance(main, Adam)

    def update(self, images: Tensor, labels: Tensor, prompted: bool) -> float:
        """One of the two updates of an iteration; without a gradient (None) the prompt stands still."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for name in self.state:
            if name.endswith("num_batches_tracked"):
                self.state[name] += 1
        loss = F.cross_entropy(self.logits(images, prompted)[:, self.sequence], labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.finds_mask:
            self.update_tau()
        return loss.item()

    def end_epoch(self) -> None:
        """The learning rates follow their cosine."""
        for schedule in self.schedules:
            schedule.step()


def scaled_start(weight: Tensor) -> Tensor:
    """S = sqrt(6 / fan_in) W / max|W|, sign kept."""
    return (math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max()).detach().clone()


def resnet18(net: Released, x: Tensor) -> Tensor:
    """ResNet-18, by torchvision's names."""
    x = F.relu(net.norm("bn1", net.conv("conv1", x, 2, 3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.relu(net.norm(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride, 1)))
            out = net.norm(f"{name}.bn2", net.conv(f"{name}.conv2", out, 1, 1))
            if stride == 2:
                x = net.norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, 2, 0))
            x = F.relu(out + x)
    return net.linear("fc", x.mean((2, 3)))


def vgg16(net: Released, x: Tensor) -> Tensor:
    """VGG-16 without batch norm, by torchvision's names, of any width of its linear layers."""
    pools_after = (2, 7, 14, 21, 28)
    for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        x = F.relu(net.conv(f"features.{place}", x, 1, 1))
        if place in pools_after:
            x = F.max_pool2d(x, 2)
    x = F.adaptive_avg_pool2d(x, 7).flatten(1)
    x = net.dropout(F.relu(net.linear("classifier.0", x)))
    x = net.dropout(F.relu(net.linear("classifier.3", x)))
    return net.linear("classifier.6", x)
