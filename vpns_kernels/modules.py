"""Drop-in layers: masked ones whose mask is being learned, and the channel mask.

A masked layer is the torch layer with two more tensors: `scores` (learned, one per unit of the pattern) and
`mask` (bool, True = kept). The forward uses weight · mask; the backward passes straight through the mask to
the scores (paper, stage 1; HYDRA): dL/dS = sign(S) · Σ_unit W · dL/d(W·m). Masked units get their gradient
too, so they can return.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels.patterns import Pattern


class _MaskWeight(torch.autograd.Function):
    """weight · mask, with the straight-through gradient to the scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        ctx.pattern = pattern
        return weight * pattern.expand(mask, tuple(weight.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scores, mask = ctx.saved_tensors
        grad_weight = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_weight = grad * ctx.pattern.expand(mask, tuple(weight.shape))
        if ctx.needs_input_grad[1]:
            grad_scores = scores.sign() * ctx.pattern.reduce_sum(weight * grad)
        return grad_weight, grad_scores, None, None


class _MaskChannels(torch.autograd.Function):
    """activation · mask over dimension 1, with the straight-through gradient sign(S) · Σ a · da."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, scores, mask)
        return x * _along_channels(mask, x).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scores, mask = ctx.saved_tensors
        grad_x = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * _along_channels(mask, x).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            others = [axis for axis in range(x.dim()) if axis != 1]
            grad_scores = scores.sign() * (x * grad).sum(others).to(scores.dtype)
        return grad_x, grad_scores, None


def copy_attributes(layer: nn.Module, twin: nn.Module) -> None:
    """Sizes, mode and hooks of a layer as they are; the tensors stay behind."""
    tensors = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    twin.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in tensors})


def _along_channels(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(1, -1, *(1 for _ in x.shape[2:]))


class _Masked:
    """What masked layers share: the pattern, the scores, the mask and the masked weight."""

    pattern: Pattern
    weight: Tensor
    scores: nn.Parameter
    mask: Tensor

    def masked_weight(self) -> Tensor:
        """weight · mask, differentiable in both weight and scores."""
        result: Tensor = _MaskWeight.apply(self.weight, self.scores, self.mask, self.pattern)  # type: ignore[no-untyped-call]
        return result

    def weight_mask(self) -> Tensor:
        """The bool mask of every single weight, [*weight.shape]."""
        return self.pattern.expand(self.mask, tuple(self.weight.shape)).contiguous()

    @classmethod
    def from_dense(cls, layer: nn.Module, pattern: Pattern) -> Self:
        """The masked twin of a torch layer, sharing its parameters; all units kept, scores zero."""
        twin: Any = cls.__new__(cls)
        nn.Module.__init__(twin)
        copy_attributes(layer, twin)
        for name in ("weight", "bias"):
            twin.register_parameter(name, getattr(layer, name))
        units = pattern.units_shape(tuple(twin.weight.shape))
        twin.pattern = pattern
        twin.scores = nn.Parameter(torch.zeros(units, dtype=twin.weight.dtype, device=twin.weight.device))
        twin.register_buffer("mask", torch.ones(units, dtype=torch.bool, device=twin.weight.device))
        masked: Self = twin
        return masked


class MaskedConv2d(_Masked, nn.Conv2d):
    """Conv2d whose weight is multiplied by a mask with learned scores: [N, C, H, W] → [N, K, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return output


class MaskedLinear(_Masked, nn.Linear):
    """Linear whose weight is multiplied by a mask with learned scores: [..., C] → [..., K]."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.masked_weight(), self.bias)


class ChannelMask(nn.Module):
    """Multiplies each channel of an activation [N, C, ...] by its mask; several sites may share one."""

    scores: nn.Parameter
    mask: Tensor

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(channels, device=device))
        self.register_buffer("mask", torch.ones(channels, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _MaskChannels.apply(x, self.scores, self.mask)  # type: ignore[no-untyped-call]
        return result


MaskModule = MaskedConv2d | MaskedLinear | ChannelMask
