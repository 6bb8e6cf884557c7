"""Drop-in layers: masked ones whose mask is being learned, and the channel mask.

A masked layer is the torch layer with two more tensors: `scores` (learned, one per unit of the pattern) and
`mask` (bool, True = kept). The forward uses weight · mask; the backward passes straight through the mask to
the scores (paper, stage 1; HYDRA): dL/dS = sign(S) · Σ_unit W · dL/d(W·m). Masked units get their gradient
too, so they can return.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._torch import autocast_input
from vpns_kernels.ops.channel_mask import channel_mask
from vpns_kernels.ops.masked_conv2d import masked_conv2d, masked_linear
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


def copy_attributes(layer: nn.Module, twin: nn.Module) -> None:
    """Sizes, mode and hooks of a layer as they are; the tensors stay behind."""
    tensors = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    twin.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in tensors})


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Contiguous where x is and nothing else, as torch's layers hand on what they get; else y itself."""
    is_last = x.dim() == 4 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous() if x.is_contiguous() and not is_last else y


class _Masked:
    """What masked layers share: the pattern, the scores, the mask and the masked weight.

    `backends` are those of the op, for a frozen weight: one name for all passes, or three (forward, gradient
    of the input, of the scores).
    """

    backends: str | tuple[str, str, str] = "auto"
    pattern: Pattern
    weight: Tensor
    scores: nn.Parameter
    mask: Tensor

    def masked_weight(self) -> Tensor:
        """weight · mask, differentiable in both weight and scores."""
        result: Tensor = _MaskWeight.apply(self.weight, self.scores, self.mask, self.pattern)  # type: ignore[no-untyped-call]
        return result

    def _check(self) -> None:
        """What the op would refuse of a frozen weight."""
        units = self.pattern.units_shape(tuple(self.weight.shape))
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != units:
            raise ValueError(
                f"{type(self).__name__}: expected a bool mask {list(units)} of pattern "
                f"{self.pattern.spec!r}, got {self.mask.dtype} {list(self.mask.shape)}"
            )

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
        """Convolve [N, C, H, W] or [C, H, W] with weight · mask, in the input's memory format."""
        if self.weight.requires_grad:
            self._check()
            output: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
            return output
        if input.dim() == 3:  # one image without a batch dimension, as torch allows
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, padding = self._padded(autocast_input(input))
        stride, dilation = (cast(Pair, tuple(pair)) for pair in (self.stride, self.dilation))
        kernel_size = cast(Pair, tuple(self.kernel_size))
        geometry = ConvGeometry(
            self.in_channels, self.out_channels, kernel_size, stride, padding, dilation, self.groups
        )
        mask, scores, bias = self.mask, self.scores, self.bias
        y = masked_conv2d(x, self.weight, mask, scores, geometry, self.pattern, bias, self.backends)
        return in_format_of(input, y)

    def _padded(self, x: Tensor) -> tuple[Tensor, Pair]:
        """The input, and the zeros that are yet to be put around it."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, cast(Pair, tuple(self.padding))
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)


class MaskedLinear(_Masked, nn.Linear):
    """Linear whose weight is multiplied by a mask with learned scores: [..., C] → [..., K]."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., C] with weight · mask: [..., K]."""
        if self.weight.requires_grad:
            self._check()
            return F.linear(input, self.masked_weight(), self.bias)
        x, mask, scores = autocast_input(input), self.mask, self.scores
        return masked_linear(x, self.weight, mask, scores, self.pattern, self.bias, self.backends)


class ChannelMask(nn.Module):
    """Multiplies each channel of an activation [N, C, ...] by its mask; several sites may share one."""

    backend: str = "auto"
    scores: nn.Parameter
    mask: Tensor

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(channels, device=device))
        self.register_buffer("mask", torch.ones(channels, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [N, C, ...] by the mask over its channels, in the memory format of x."""
        return in_format_of(x, channel_mask(x, self.scores, self.mask, self.backend))


MaskModule = MaskedConv2d | MaskedLinear | ChannelMask
