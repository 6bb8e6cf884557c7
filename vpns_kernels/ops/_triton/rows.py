"""How does a kernel see an activation? As rows of channels, by descriptors of which one holds one class.

The copy engine wants rows that begin at multiples of 16 bytes: what lies otherwise is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton.launch import ALIGNMENT_BYTES
from vpns_kernels.ops._triton.tiles import PixelTile

# Entries that 32 bits count.
NEAR = 2**31 - 1


def as_rows(x: Tensor, stride: Pair = (1, 1)) -> Tensor:
    """[N, C, H, W] → [N, H', W', C'], dense along C', whose strides and start are multiples of 16 bytes.

    Zeros are appended where C does not fill 16 bytes, or where an axis is so short that a class of its pixels
    would be empty.
    """
    rows = x.permute(0, 2, 3, 1)
    _, H, W, C = rows.shape
    unit = ALIGNMENT_BYTES // x.element_size()
    missing = (-C % unit, max(0, stride[1] - W), max(0, stride[0] - H))
    if any(missing):
        rows = F.pad(rows, (0, missing[0], 0, missing[1], 0, missing[2]))
    return rows if is_aligned(rows) else rows.contiguous()


def split_classes(rows: Tensor, stride: Pair) -> list[Tensor]:
    """A view of the pixels of each class, in the order of `taps.list_taps`."""
    return [rows[:, h :: stride[0], w :: stride[1]] for h in range(stride[0]) for w in range(stride[1])]


def is_aligned(rows: Tensor) -> bool:
    """Whether the copy engine takes [N, H, W, C] as it lies."""
    unit = ALIGNMENT_BYTES // rows.element_size()
    long_axes = [step for size, step in zip(rows.shape[:-1], rows.stride()[:-1], strict=True) if size > 1]
    is_dense = rows.shape[-1] == 1 or rows.stride(-1) == 1
    fits = all(step % unit == 0 and step > 0 for step in long_axes)
    return is_dense and fits and rows.data_ptr() % ALIGNMENT_BYTES == 0


def is_far(rows: Tensor, box: PixelTile) -> bool:
    """Whether places of a box of [N, H, W, C] lie too far apart for 32 bits; its corner is found in 64."""
    reach = (box.images, box.rows, box.columns, rows.shape[3])
    return sum(size * step for size, step in zip(reach, rows.stride(), strict=True)) > NEAR


def empty_activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unwritten, channels_last."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
