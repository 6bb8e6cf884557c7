"""What does the published scheme cost in torch? Its formulas as released, on channels_last: the opponent.

Dense weights times their mask at every forward, one threshold over all concatenated scores after every
update of search, the prompt laid over the image and clamped. None of our own code is in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Published:
    """A stage of the published scheme, as far as an update needs it.

    Args:
        optimizer: that of scores or weights, and that of the prompt.
        threshold: None in tuning, where the mask stands still.
    """

    predictor: PublishedPredictor
    optimizer: Both
    threshold: Threshold | None


def publish(
    network: nn.Module,
    stage: str,
    variant: str,
    canvas: int,
    frame: int,
    density: float,
    dtype: torch.dtype,
    is_compiled: bool = False,
) -> Published:
    """Turn a plain network, in place, into a stage ("search" or "tune") of the published scheme.

    Args:
        variant: "released", or "framed": the same with the prompt around a smaller image, sigmoid(P).
        dtype: float32, or bfloat16 for autocast around the network.
        is_compiled: whether torch.compile computes the network.
    """
    threshold = Threshold(network, density)
    threshold.update()
    is_search = stage == "search"
    for layer in threshold.layers:
        layer.scores.requires_grad_(is_search)
    for name, parameter in network.named_parameters():
        if not name.endswith(".scores"):
            parameter.requires_grad_(not is_search)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # Of whole iterations only a batch's size differs; a compiler that allowed for others would be slower.
    forward = torch.compile(network, dynamic=False) if is_compiled else network
    predictor = PublishedPredictor(forward, variant, canvas, frame, dtype).to(threshold.tau.device)
    if is_search:
        pair: list[Optimizer] = [Adam(p, lr=1e-4, weight_decay=1e-4) for p in (learned, [predictor.prompt])]
    else:
        pair = [SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4) for p in (learned, [predictor.prompt])]
    return Published(predictor.train(), Both(pair), threshold if is_search else None)


class _Step(torch.autograd.Function):
    """1 where the magnitude is above tau; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, tau: Tensor) -> Tensor:
        return (magnitude > tau).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Masked:
    """A torch layer whose weight is multiplied by the step of its scores."""

    weight: nn.Parameter
    scores: nn.Parameter
    tau: Tensor

    def masked_weight(self) -> Tensor:
        step: Tensor = _Step.apply(self.scores.abs(), self.tau)  # type: ignore[no-untyped-call]
        return self.weight * step


class MaskedConv2d(_Masked, nn.Conv2d):
    """Convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.masked_weight(), self.bias)


class MaskedLinear(_Masked, nn.Linear):
    """Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)


class Threshold:
    """Masks all layers of a network; tau is the k-th smallest |S| of them all, k = int((1 - density) n)."""

    def __init__(self, network: nn.Module, density: float) -> None:
        self.density = density
        self.layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.tau = torch.zeros((), device=self.layers[0].weight.device)
        for layer in self.layers:
            weight = layer.weight.detach()
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            layer.__class__ = MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedLinear
            layer.weight = nn.Parameter(weight)
            layer.scores = nn.Parameter(math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max())
            layer.register_buffer("tau", self.tau)

    @torch.no_grad()
    def update(self) -> None:
        """tau follows the scores; what ties with it is pruned."""
        # In the order in which they lie in memory, which selecting does not depend on.
        magnitudes = torch.cat([_in_memory_order(layer.scores).abs() for layer in self.layers])
        k = int((1 - self.density) * magnitudes.numel())
        if k >= 1:
            self.tau.copy_(magnitudes.kthvalue(k).values)


def _in_memory_order(tensor: Tensor) -> Tensor:
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).flatten()


class PublishedPredictor(nn.Module):
    """Images [N, 3, size, size] in [0, 1] → logits, by prompt, normalisation and network."""

    def __init__(self, network: nn.Module, variant: str, canvas: int, frame: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.variant, self.frame, self.dtype = network, variant, frame, dtype
        self.prompt = nn.Parameter(torch.zeros(3, canvas, canvas))
        frame_mask = torch.ones(1, canvas, canvas)
        frame_mask[:, frame : canvas - frame, frame : canvas - frame] = 0
        self.register_buffer("frame_mask", frame_mask)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, images: Tensor, prompted: bool) -> Tensor:
        canvas = lay_over(
            images, self.prompt if prompted else None, self.frame_mask, self.variant, self.frame
        )
        x = ((canvas - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits: Tensor = self.network(x)
        return logits.float()


def lay_over(images: Tensor, prompt: Tensor | None, mask: Tensor, variant: str, frame: int) -> Tensor:
    """The canvas in [0, 1]: image and prompt, before normalisation."""
    if variant == "released":
        return images if prompt is None else (images + prompt * mask).clamp(0, 1)
    canvas = F.pad(images, (frame,) * 4)
    return canvas if prompt is None else canvas + prompt.sigmoid() * mask


class Both:
    """Two optimizers that step together."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
