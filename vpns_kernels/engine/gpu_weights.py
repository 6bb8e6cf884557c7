"""What does a GPU engine know of a layer? Its weights, dense and as what was kept, and what comes after."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.engine.plan import CURVES, Plan, PlanStep
from vpns_kernels.engine.select import detect_pattern
from vpns_kernels.formats import Packed, pack, unpack
from vpns_kernels.ops._torch import ACTS, finish

# Weights that are drawn are exactly 0 now and then; to leave out so few gains nothing.
_CHANCE = 0.99
_CURVES = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": F.sigmoid,
    "gelu": F.gelu,
}
assert set(_CURVES) == set(CURVES)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """A layer of a plan, for one device.

    Args:
        dtype, out_dtype: of its input, to which its weights are rounded, and of its output.
    """

    step: PlanStep
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype

    @classmethod
    def of_step(cls, plan: Plan, step: PlanStep, device: torch.device) -> LayerWeights:
        """The weights of a convolution or linear layer of a plan, to be run on that device."""
        assert step.x is not None
        assert step.output is not None
        found = cls(step, device, plan.values[step.x].dtype, plan.values[step.output].dtype)
        # Small, and read by whoever runs the layer: not to be made in the midst of a call.
        _ = found.rounded_bias, found.constant
        return found

    @property
    def stored(self) -> Packed:
        """The packed weight as the plan has it, on the CPU."""
        assert self.step.layer is not None
        return self.step.layer.packed

    @cached_property
    def dense(self) -> Tensor:
        """[K, C / groups, R, S] with zeros in place, channels_last."""
        found = unpack(self.stored.values, self.stored.layout, self.step.geometry)
        return found.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    @cached_property
    def packed(self) -> Packed | None:
        """What was kept, on the device; None where nothing was pruned.

        A layer that ran faster with everything, where the plan was made, was stored with everything: then its
        zeros tell.
        """
        stored, geometry = self.stored, self.step.geometry
        kept = unpack(torch.ones_like(stored.values), stored.layout, geometry) != 0
        if bool(kept.all()):
            weight = unpack(stored.values, stored.layout, geometry)
            kept = weight != 0
            if int(kept.sum()) > _CHANCE * kept.numel():
                return None
            pattern = detect_pattern(kept, geometry.groups)
            assert pattern is not None
            stored = pack(weight, kept, pattern, geometry)
        values = stored.values.to(self.device, self.dtype)
        layout = tuple(array.to(self.device) for array in stored.layout)
        return Packed(values, layout, stored.pattern, geometry)

    @cached_property
    def bias(self) -> Tensor | None:
        """[K], float32."""
        assert self.step.layer is not None
        bias = self.step.layer.bias
        return None if bias is None else bias.to(self.device, torch.float32)

    @cached_property
    def rounded_bias(self) -> Tensor | None:
        """[K], in the type of the weights, as torch's layers take it."""
        return None if self.bias is None else self.bias.to(self.dtype)

    @cached_property
    def constant(self) -> Tensor | None:
        """[1, K, P, Q], added to every image.

        The plan's own goes through the activation where an output sees no image; to do so twice is the same.
        """
        constant = self.step.constant
        return None if constant is None else constant.to(self.device).permute(2, 0, 1)[None]

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a matrix product: one pixel in, one pixel out."""
        return self.step.op == "linear"

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """What follows a layer's sums; y is nobody else's."""
        if self.constant is not None:
            y = y.add_(self.constant)
        act = self.step.act
        y = finish(y, residual, act if act in ACTS else "none", self.out_dtype, in_place=True)
        return curve(y, act)


def curve(y: Tensor, act: str) -> Tensor:
    """The activations that bend; y itself where it is none of them."""
    return _CURVES[act](y) if act in _CURVES else y
