"""The truth: unpack to a dense weight, convolve in float32 (float64 for float64), add, activate, round once.

As in any dense layer, a NaN or infinity also reaches outputs through the zeros between kept weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.formats import unpack
from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.ops._torch import finish, sum_dtype


def why_not(x: Tensor, values: Tensor, *rest: object) -> str | None:
    """The reference takes everything that torch convolves."""
    return None


def run(
    x: Tensor,
    values: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    out_dtype: torch.dtype,
) -> Tensor:
    wide = sum_dtype(x.dtype)
    weight = unpack(values, layout, ConvGeometry.from_weight(weight_shape, groups=groups)).to(wide)
    wide_bias = None if bias is None else bias.to(wide)
    y = F.conv2d(x.to(wide), weight, wide_bias, stride, padding, dilation, groups)
    return finish(y, residual, act, out_dtype)
