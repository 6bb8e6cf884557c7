"""Channel format: the smaller dense weight, and which output and input channels it stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry


def pack(weight: Tensor, mask: Tensor, geometry: ConvGeometry) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(values [kept K, kept C, R, S], (kept output, kept input channels)) of a mask of whole channels."""
    check_groups(geometry)
    kept_out = mask.flatten(1).any(1)
    kept_in = mask.any(0).flatten(1).any(1)
    if not torch.equal(mask, (kept_out[:, None] & kept_in[None, :])[..., None, None].expand_as(mask)):
        raise ValueError(
            "channel format: expected a mask of whole channels, got one that cuts within a channel"
        )
    layout = tuple(kept.nonzero().flatten().to(torch.int32) for kept in (kept_out, kept_in))
    return weight[kept_out][:, kept_in].contiguous(), layout


def check_groups(geometry: ConvGeometry) -> None:
    """Refuse grouped convolutions, of which fewer channels are no smaller dense weight."""
    if geometry.groups != 1:
        raise NotImplementedError(
            f"channel format: expected groups 1, got {geometry.groups} (use unstructured)"
        )


def unpack(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """The dense weight [K, C, R, S]; differentiable in values."""
    rows, columns = (kept.long() for kept in layout)
    return values.new_zeros(geometry.weight_shape).index_put((rows[:, None], columns[None, :]), values)


def pick(dense: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """[kept K, kept C, R, S] entries of a dense tensor."""
    rows, columns = (kept.long() for kept in layout)
    return dense[rows][:, columns]


def validate(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> None:
    """ValueError where the arrays do not describe a weight of this geometry."""
    K, C, R, S = geometry.weight_shape
    if len(layout) != 2:
        raise ValueError(f"layout: expected kept output and input channels, got {len(layout)} arrays")
    for name, kept, limit in (("output", layout[0], K), ("input", layout[1], C)):
        if kept.dtype != torch.int32 or kept.dim() != 1:
            raise ValueError(
                f"layout: expected kept {name} channels int32 [n], got {kept.dtype} {list(kept.shape)}"
            )
        if kept.numel() and (
            int(kept[0]) < 0 or int(kept[-1]) >= limit or bool((kept.long().diff() <= 0).any())
        ):
            raise ValueError(f"layout: expected kept {name} channels to ascend within [0, {limit})")
    expected = (layout[0].numel(), layout[1].numel(), R, S)
    if tuple(values.shape) != expected:
        raise ValueError(f"layout: expected values {list(expected)}, got {list(values.shape)}")
