"""What does a filter tap read? One class of input pixels, shifted: so strides need no gathering.

Along an axis with stride s, output p reads input p · s + (r · dilation − padding). Written as
s · (p + shift) + phase with 0 <= phase < s, a tap reads the pixels of its phase, shifted by whole steps. In
the other direction, pixels of a phase get their gradient from the taps of that phase alone, shifted back.
The phases of both axes make a class: one for stride 1, four for stride 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry, Pair

# Shifts are kept in a byte.
_LARGEST_SHIFT = 127


@dataclass(frozen=True)
class Tap:
    """One position of the filter.

    Args:
        index: r · S + s.
        phase: of rows and columns, each below the stride.
        shift: in steps of the stride.
    """

    index: int
    phase: Pair
    shift: Pair


@lru_cache(maxsize=1024)
def list_taps(geometry: ConvGeometry) -> tuple[tuple[Tap, ...], ...]:
    """The taps of each class, classes in the order phase_h · stride_w + phase_w."""
    R, S = geometry.kernel_size
    classes: list[list[Tap]] = [[] for _ in range(geometry.stride[0] * geometry.stride[1])]
    for r in range(R):
        for s in range(S):
            found = [
                divmod(place * geometry.dilation[axis] - geometry.padding[axis], geometry.stride[axis])
                for axis, place in enumerate((r, s))
            ]
            (shift_h, phase_h), (shift_w, phase_w) = found
            tap = Tap(r * S + s, (phase_h, phase_w), (shift_h, shift_w))
            classes[phase_h * geometry.stride[1] + phase_w].append(tap)
    return tuple(map(tuple, classes))


def why_not(geometry: ConvGeometry) -> str | None:
    """Strides of 1 and 2, no groups, and shifts that fit in a byte."""
    if geometry.groups != 1:
        return f"it takes groups=1, got {geometry.groups}"
    if max(geometry.stride) > 2:
        return f"it takes strides of 1 and 2, got {geometry.stride}"
    reach = max(abs(step) for taps in list_taps(geometry) for tap in taps for step in tap.shift)
    return None if reach <= _LARGEST_SHIFT else f"it takes taps within {_LARGEST_SHIFT} steps, got {reach}"


@lru_cache(maxsize=1024)
def tap_table(geometry: ConvGeometry, sign: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(taps int32 [R · S], by class, each packed as `pack_tap`; ends of the classes among them, int32).

    Args:
        sign: 1 for the direction of the forward pass, -1 for the other.
    """
    classes = list_taps(geometry)
    packed = [pack_tap(tap, sign) for taps in classes for tap in taps]
    ends = torch.tensor([len(taps) for taps in classes]).cumsum(0)
    table = torch.tensor(packed, dtype=torch.int32)
    return table.to(device), ends.to(device, torch.int32)


def pack_tap(tap: Tap, sign: int) -> int:
    """Shifts in the low two bytes, 128 standing for none; the index above."""
    shift_h, shift_w = (sign * step + 128 for step in tap.shift)
    return shift_h | shift_w << 8 | tap.index << 16
