"""What do stores of a convolution do before they round? act(sums + bias + residual), in float32."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_ACTS = {"none": 0, "relu": 1, "relu6": 2}


@dataclass(frozen=True)
class Epilogue:
    """What follows the sums: act(sums + bias + residual).

    Args:
        residual: [N, K, P, Q], channels_last, or None.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    act: str = "none"

    def pointers(self, target: Tensor) -> dict[str, Tensor]:
        """Arguments of a kernel; the target stands in for what there is not, and is not read."""
        return {
            "bias_ptr": target if self.bias is None else self.bias,
            "residual_ptr": target if self.residual is None else self.residual,
        }

    @property
    def constants(self) -> dict[str, bool | int]:
        """The constants that a kernel is compiled with."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "ACT": _ACTS[self.act],
        }


@triton.jit
def finish(
    acc,
    bias_ptr,
    residual_ptr,
    columns,
    column_mask,
    offs,
    mask,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
):
    """float32, as acc: of each column its bias; the residual lies as what is written, at offs where mask."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0).to(tl.float32)
    if ACT > 0:
        # A NaN stays one, as in torch.
        acc = tl.where(acc < 0, 0.0, acc)
    if ACT > 1:
        acc = tl.where(acc > 6, 6.0, acc)
    return acc
