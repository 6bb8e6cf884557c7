"""How is a kernel's result judged? Against float64, within a bound that torch's own dense kernel sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry


def conv_excess(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    residual: Tensor | None = None,
    act: str = "none",
    half_sums: bool = False,
) -> float:
    """How far a convolution's result lies beyond the bound; at most 1 is right.

    The bound per output is 2 · e · Σ|w||x| plus half a unit in the last place of the output, where e is the
    largest |error| / Σ|w||x| of torch's dense kernel with the same input and output type, and at least the
    unit roundoff of its sums (on a few numbers the dense kernel's error can be zero by luck). A residual is
    one more term of the sums; an activation brings no two numbers further apart.

    Args:
        y: [N, K, P, Q], the result that is judged, in any floating dtype.
        weight: [K, C / groups, R, S] with zeros in place, in the dtype of the stored values.
        half_sums: y comes from a kernel that sums in float16 and is judged against torch's dense bfloat16
            kernel, the rounding of its outputs included.
    """
    g = geometry
    conv = (g.stride, g.padding, g.dilation, g.groups)
    bias64 = None if bias is None else bias.double()
    truth = F.conv2d(x.double(), weight.double(), bias64, *conv)
    scale = F.conv2d(x.double().abs(), weight.double().abs(), None if bias64 is None else bias64.abs(), *conv)
    if truth.numel() == 0:
        return 0.0 if y.shape == truth.shape else float("inf")
    if x.dtype == torch.float64:
        # Nothing more exact to compare with: two orders of summation differ by at most this.
        roundoff = torch.finfo(torch.float64).eps * weight[0].numel()
    else:
        roundoff = torch.finfo(torch.float32).eps / 2
    # Torch has no kernel whose output has another type: the nearest one takes and gives both.
    peer_x = x.to(torch.promote_types(x.dtype, y.dtype))
    if half_sums:
        half_bias = None if bias is None else bias.bfloat16()
        half = F.conv2d(x.bfloat16(), weight.bfloat16(), half_bias, *conv).double()
        peer = float(((half - truth).abs() / scale.clamp(min=torch.finfo(torch.float64).tiny)).max())
        relative = 2 * max(peer, torch.finfo(torch.float16).eps / 2)
    else:
        relative = 2 * max(_dense_error(peer_x, weight, bias, g, truth, scale), roundoff)
    if residual is not None:
        truth, scale = truth + residual.double(), scale + residual.double().abs()
    truth = _activate(truth, act)
    bound = relative * scale + _ulp(truth, y.dtype) / 2
    error = (y.double() - truth).abs()
    excess = torch.where(error == 0, 0.0, error / bound)
    return float("inf") if bool(excess.isnan().any()) else float(excess.max())


def _activate(y: Tensor, act: str) -> Tensor:
    return y if act == "none" else F.relu(y) if act == "relu" else F.relu6(y)


def _ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """At least one unit in the last place; below the normal numbers it stays what it is there."""
    kind = torch.finfo(dtype)
    return kind.eps * value.abs().clamp(min=kind.smallest_normal)


def _dense_error(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, truth: Tensor, scale: Tensor
) -> float:
    """Largest |error| / Σ|w||x| of torch's dense kernel, beyond the rounding of the output.

    Over a few orders of the input channels: one order of summation is a sample of one.
    """
    g, worst = geometry, 0.0
    generator = torch.Generator().manual_seed(0)
    channels = g.in_channels // g.groups
    orders = [torch.arange(channels), *(torch.randperm(channels, generator=generator) for _ in range(3))]
    for order in orders:
        everywhere = (torch.arange(g.groups)[:, None] * channels + order).flatten()
        dense = F.conv2d(
            x[:, everywhere],
            weight[:, order].to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
        )
        beyond_ulp = ((dense.double() - truth).abs() - _ulp(truth, x.dtype) / 2).clamp(min=0)
        worst = max(worst, float((beyond_ulp / scale.clamp(min=torch.finfo(torch.float64).tiny)).max()))
    return worst


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty gives NaN (or the largest integer), so that what stays unwritten shows."""
    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fill.fill_uninitialized_memory = before[1]
