"""What is a packed weight? Kept values, and a layout that says where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import Pattern


@dataclass(frozen=True)
class Packed:
    """A pruned weight in its portable, validated form; the rank of `values` tells the format.

    unstructured: values [count]; block: values [count, bk, bc], zeros beyond ragged edges; channel: values
    [kept K, kept C, R, S].

    layout of the first two: (indptr, index, indptr_t, index_t, permutation), all int32. Row k (block row)
    of the weight holds the entries indptr[k] ... indptr[k + 1], each at the flat place index = (c · R + r)
    · S + s inside its group, ascending. The transposed index lists the same entries by input channel
    (block): entry j of it stands at the flat place index_t = (k · R + r) · S + s and has its values at
    permutation[j] of the forward order. Values exist once. layout of channel: (kept output channels, kept
    input channels).
    """

    values: Tensor
    layout: tuple[Tensor, ...]
    pattern: Pattern
    geometry: ConvGeometry

    @property
    def density(self) -> float:
        """Stored fraction of the dense weight's entries (padding at ragged edges not counted twice)."""
        K, C, R, S = self.geometry.weight_shape
        return min(1.0, self.values.numel() / (K * C * R * S))


def sorted_index(rows: Tensor, columns: Tensor, row_count: int) -> tuple[Tensor, Tensor]:
    """(indptr, columns) of entries that are already ordered by row, as int32."""
    counts = torch.bincount(rows, minlength=row_count)
    indptr = counts.new_zeros(row_count + 1)
    indptr[1:] = counts.cumsum(0)
    return indptr.to(torch.int32), columns.to(torch.int32)


def build_layout(rows: Tensor, channels: Tensor, taps: Tensor, sizes: LayoutSizes) -> tuple[Tensor, ...]:
    """The five arrays of a layout from entries in forward order.

    Args:
        rows, channels, taps: int64 [count]; row, input channel within the group, and tap r · S + s of each
        entry.
    """
    indptr, index = sorted_index(rows, channels * sizes.taps + taps, sizes.rows)
    absolute = rows // sizes.rows_per_group * sizes.channels_per_group + channels
    flat = rows * sizes.taps + taps
    permutation = torch.argsort(absolute * (sizes.rows * sizes.taps) + flat)
    indptr_t, index_t = sorted_index(absolute[permutation], flat[permutation], sizes.channels)
    return indptr, index, indptr_t, index_t, permutation.to(torch.int32)


def entry_rows(indptr: Tensor, count: int) -> Tensor:
    """The row of each of `count` entries, int64, on the pointers' device; nothing waits for a GPU."""
    rows = torch.arange(len(indptr) - 1, device=indptr.device)
    # Where it does not know, a GPU would have to tell the host; a CPU counts, and checks.
    size = None if indptr.device.type == "cpu" else count
    return torch.repeat_interleave(rows, indptr.long().diff(), output_size=size)


@dataclass(frozen=True)
class LayoutSizes:
    """How many rows (output channels or block rows), input channels (or blocks) and taps a layout has."""

    rows_per_group: int
    channels_per_group: int
    taps: int
    groups: int

    @property
    def rows(self) -> int:
        """Rows of all groups together."""
        return self.rows_per_group * self.groups

    @property
    def channels(self) -> int:
        """Input channels (or blocks) of all groups together."""
        return self.channels_per_group * self.groups


def check_layout(layout: tuple[Tensor, ...], count: int, sizes: LayoutSizes) -> None:
    """Refuse arrays that do not describe `count` entries of a weight of these sizes.

    Raises:
        ValueError: a wrong number of arrays, a wrong type or length, or an entry out of range, out of order
            or double.
    """
    names = ("indptr", "index", "indptr_t", "index_t", "permutation")
    lengths = (sizes.rows + 1, count, sizes.channels + 1, count, count)
    if len(layout) != len(names):
        raise ValueError(f"layout: expected {len(names)} arrays {names}, got {len(layout)}")
    for name, array, length in zip(names, layout, lengths, strict=True):
        if array.dtype != torch.int32 or array.shape != (length,):
            raise ValueError(
                f"layout: expected {name} int32 [{length}], got {array.dtype} {list(array.shape)}"
            )
    rows = _check_index("index", layout[0], layout[1], sizes.channels_per_group * sizes.taps)
    channels = _check_index("index_t", layout[2], layout[3], sizes.rows * sizes.taps)
    permutation = layout[4].long()
    if count and not torch.equal(permutation.sort().values, torch.arange(count, device=permutation.device)):
        raise ValueError(f"layout: expected permutation to hold 0 ... {count - 1} once each")
    entry = layout[1].long()[permutation]
    absolute = rows[permutation] // sizes.rows_per_group * sizes.channels_per_group + entry // sizes.taps
    flat = rows[permutation] * sizes.taps + entry % sizes.taps
    if not (torch.equal(absolute, channels) and torch.equal(flat, layout[3].long())):
        raise ValueError("layout: expected the transposed index to list the entries of the forward index")


def _check_index(name: str, indptr: Tensor, index: Tensor, limit: int) -> Tensor:
    """Refuse a bad index; the row of each entry otherwise."""
    steps = indptr.long().diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != index.numel() or bool((steps < 0).any()):
        raise ValueError(f"layout: expected the pointers of {name} to rise from 0 to {index.numel()}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
        raise ValueError(
            f"layout: expected {name} in [0, {limit}), got {int(index.min())} ... {int(index.max())}"
        )
    rows = torch.repeat_interleave(torch.arange(steps.numel(), device=steps.device), steps)
    if bool(((rows.diff() == 0) & (index.long().diff() <= 0)).any()):
        raise ValueError(f"layout: expected {name} to ascend within each row, without doubles")
    return rows
