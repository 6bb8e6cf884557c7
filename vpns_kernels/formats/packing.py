"""How is a masked weight packed, unpacked and checked? By the format of its pattern."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from vpns_kernels.formats import block, channel, unstructured
from vpns_kernels.formats.base import Packed
from vpns_kernels.formats.layouts import LayoutCache
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import Block, Channel, Pattern, Unstructured

# The rank of the values tells the format.
_FORMATS = {1: unstructured, 3: block, 4: channel}
# Of what was found valid on a GPU.
_valid: LayoutCache[None] = LayoutCache()
_VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pack(
    weight: Tensor, mask: Tensor, pattern: Pattern, geometry: ConvGeometry, dtype: torch.dtype | None = None
) -> Packed:
    """The kept part of a weight.

    Args:
        weight: [K, C / groups, R, S], or [K, C] of a linear layer.
        mask: bool of the weight's shape, True = kept.
        dtype: of the stored values: float32, bfloat16, float16 or float64; the weight's own by default.

    Raises:
        ValueError: shapes that disagree, kept weights that are not finite in dtype, a mask that breaks a
            channel pattern.
        NotImplementedError: blocks that would cross a group, channels of a grouped convolution.
    """
    dtype = dtype or weight.dtype
    if dtype not in _VALUE_DTYPES:
        raise TypeError(f"pack: expected values in one of {_VALUE_DTYPES}, got {dtype}")
    shapes: list[tuple[int, ...]] = [geometry.weight_shape]
    if geometry.kernel_size == (1, 1):
        shapes.append(geometry.weight_shape[:2])
    if tuple(weight.shape) not in shapes:
        raise ValueError(f"pack: expected a weight {list(geometry.weight_shape)}, got {list(weight.shape)}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"pack: expected a bool mask {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    dense = weight.detach().reshape(geometry.weight_shape).cpu().to(dtype)
    kept = mask.reshape(geometry.weight_shape).cpu()
    if not bool((dense.isfinite() | ~kept).all()):
        raise ValueError(f"pack: expected weights finite in {dtype}, got NaN or infinity among the kept ones")
    dense = torch.where(kept, dense, dense.new_zeros(()))
    if isinstance(pattern, Block):
        values, layout = block.pack(dense, kept, geometry, pattern.bk, pattern.bc)
    elif isinstance(pattern, Channel):
        values, layout = channel.pack(dense, kept, geometry)
    else:
        values, layout = unstructured.pack(dense, kept, geometry)
    return Packed(values, layout, pattern, geometry)


def holding_pattern(pattern: Pattern, geometry: ConvGeometry) -> Pattern:
    """The pattern in whose format a weight is packed: its own, or, where that cannot, unstructured."""
    return pattern if why_not(pattern, geometry) is None else Unstructured()


def why_not(pattern: Pattern, geometry: ConvGeometry) -> str | None:
    """Why the pattern's format cannot hold a weight of this geometry; None where it can."""
    try:
        if isinstance(pattern, Block):
            block.sizes(geometry, pattern.bk, pattern.bc)
        elif isinstance(pattern, Channel):
            channel.check_groups(geometry)
    except NotImplementedError as error:
        return str(error)
    return None


def unpack(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """The dense weight [K, C / groups, R, S] with zeros in place; differentiable in values."""
    dense: Tensor = _format(values).unpack(values, layout, geometry)
    return dense


def pick(dense: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> Tensor:
    """What stands in a dense tensor [K, C / groups, R, S] where the values stand, in their shape."""
    picked: Tensor = _format(values).pick(dense, values, layout, geometry)
    return picked


def validate(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> None:
    """Refuse arrays that do not describe a weight of this geometry, before any kernel sees them.

    Those of a GPU are looked at when they are first seen, and again once they changed.

    Raises:
        ValueError: says which array is wrong and how.
    """
    if values.dtype not in _VALUE_DTYPES:
        raise ValueError(f"layout: expected values in one of {_VALUE_DTYPES}, got {values.dtype}")
    if not layout or layout[0].device.type == "cpu":
        _format(values).validate(values, layout, geometry)
        return

    def look() -> None:
        on_cpu = values.new_empty(values.shape, device="cpu")
        _format(values).validate(on_cpu, [array.cpu() for array in layout], geometry)

    # On the CPU, and once: a look at a GPU's arrays at each call would make the host wait.
    _valid.get(layout, (geometry, tuple(values.shape)), look)


def _format(values: Tensor) -> ModuleType:
    if values.dim() not in _FORMATS:
        raise ValueError(f"layout: expected values of rank {sorted(_FORMATS)}, got {list(values.shape)}")
    return _FORMATS[values.dim()]
