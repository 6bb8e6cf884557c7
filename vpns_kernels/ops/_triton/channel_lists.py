"""Which channels does a weight keep, for the kernels? Of a packed weight once, of a mask at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vpns_kernels.formats import validate
from vpns_kernels.formats.layouts import LayoutCache
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton import taps
from vpns_kernels.ops._triton.launch import ALIGNMENT_BYTES, is_aligned


@dataclass(frozen=True)
class ChannelList:
    """The channels of an activation, those that are kept first.

    Args:
        order: int32 [channels]; the kept ones, ascending, then the others, ascending.
        kept: how many are; int32 [1] where only the device knows.
        first: the first channel of the kept ones where they follow one another without a gap, else None.
    """

    order: Tensor
    kept: int | Tensor
    first: int | None

    @property
    def count(self) -> int:
        """How many channels there are, kept or not."""
        return self.order.numel()

    @property
    def most_kept(self) -> int:
        """How many channels are kept; all of them where only the device knows."""
        return self.kept if isinstance(self.kept, int) else self.count

    @property
    def is_whole(self) -> bool:
        """Whether all are kept, so that each stands at its own number."""
        return self.kept == self.count if isinstance(self.kept, int) else False


@dataclass(frozen=True)
class PackedChannels:
    """The channels that a packed weight writes and reads."""

    outputs: ChannelList
    inputs: ChannelList


_packed: LayoutCache[PackedChannels] = LayoutCache()


def why_not(geometry: ConvGeometry, dtype: torch.dtype) -> str | None:
    """What the kernels of channels take."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return taps.why_not(geometry)


def packed_channels(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> PackedChannels:
    """The channels of values [kept K, kept C, R, S]; a layout is checked when first seen or changed.

    Raises:
        ValueError: a layout that does not describe the weight.
    """

    def make() -> PackedChannels:
        arrays = [array.cpu() for array in layout]
        validate(values.cpu(), arrays, geometry)
        counts = (geometry.out_channels, geometry.in_channels)
        outputs, inputs = (
            _list_kept(kept, count, values.device) for kept, count in zip(arrays, counts, strict=True)
        )
        return PackedChannels(outputs, inputs)

    return _packed.get(layout, (geometry, tuple(values.shape), values.device), make)


def masked_channels(mask: Tensor) -> ChannelList:
    """The channels of a bool mask [channels], on its device: nothing waits for the host."""
    order = (~mask).to(torch.uint8).argsort(stable=True)
    return ChannelList(order.to(torch.int32), mask.sum(dtype=torch.int32).view(1), None)


@lru_cache(maxsize=1024)
def all_channels(count: int, device: torch.device) -> ChannelList:
    """Where nothing is masked."""
    return ChannelList(torch.arange(count, dtype=torch.int32, device=device), count, 0)


def _list_kept(kept: Tensor, count: int, device: torch.device) -> ChannelList:
    """Of ascending channels, on the CPU."""
    is_kept = torch.zeros(count, dtype=torch.bool).index_fill_(0, kept.long(), True)
    order = torch.cat([kept, (~is_kept).nonzero()[:, 0].to(torch.int32)])
    number = kept.numel()
    is_run = number > 0 and int(kept[-1]) - int(kept[0]) == number - 1
    return ChannelList(order.to(device), number, int(kept[0]) if is_run else None)


def filters(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[K', C', R, S] → a view [R · S, K', C'] dense along C', of which a tap's filters are boxes.

    Nothing is copied where the values are of the type and lie channels_last, the first of all and rows of C'
    channels at multiples of 16 bytes: as those that this returns, permuted back.
    """
    found = values.detach().to(dtype)
    if not found.numel():
        # A descriptor has no empty axis; no program reads what stands in.
        return found.new_zeros((1, 1, _unit(dtype)))
    K, C, R, S = found.shape
    view = found.permute(2, 3, 0, 1)
    unit = _unit(dtype)
    long_axes = [step for size, step in zip(view.shape[:3], view.stride()[:3], strict=True) if size > 1]
    is_dense = C == 1 or view.stride(3) == 1
    if not (is_dense and all(step % unit == 0 for step in long_axes) and is_aligned(found)):
        padded = found.new_empty((K, R, S, -(-C // unit) * unit))[..., :C]
        view = padded.copy_(found.permute(0, 2, 3, 1)).permute(1, 2, 0, 3)
    return view.flatten(0, 1)


def listed_filters(weight: Tensor, dim: int, channels: ChannelList, dtype: torch.dtype) -> Tensor:
    """The `filters` of a dense weight whose axis `dim` goes through a list: what is kept is side by side."""
    return filters(weight.detach().index_select(dim, channels.order), dtype)


def packed_filters(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [K', C', R, S] as `filters` leaves them in place."""
    if not values.numel():
        return values.to(dtype)
    R, S = values.shape[2:]
    found = filters(values, dtype)
    return found.view(R, S, *found.shape[1:]).permute(2, 3, 0, 1)


def _unit(dtype: torch.dtype) -> int:
    return ALIGNMENT_BYTES // dtype.itemsize
