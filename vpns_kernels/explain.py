"""I pruned it: why is it not faster? What a layer is expected to cost, kernel by kernel, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vpns_kernels.choose import (
    Candidate,
    Choice,
    Machine,
    break_even_density,
    choose,
    query_of,
    this_machine,
)
from vpns_kernels.choose_gpu import UNMEASURED
from vpns_kernels.cost import TERMS, LayerQuery
from vpns_kernels.patterns import Pattern
from vpns_kernels.text_table import align

# As a reason has it where coefficients were carried over.
_UNMEASURED = "measured: false"


@dataclass(frozen=True)
class Explanation:
    """A choice with its background; as a string, for people: the kernels that can run the layer, the fastest
    first, with what their estimates are made of, and then why the others cannot.

    Behind ± stands by what share of itself an estimate may be off, in nine cases of ten. "measured: false"
    says that nobody has measured the kernel on this kind of CPU: its estimate is carried over from another.
    """

    query: LayerQuery
    machine: Machine
    choice: Choice
    break_even_density: float

    def __str__(self) -> str:
        lines = [_describe(self.query, self.machine), self.choice.reason, self._break_even(), ""]
        able = sorted(
            filter(_is_able, self.choice.candidates), key=lambda c: math.inf if c.ms is None else c.ms
        )
        names = [name for name in TERMS if any(_part(c, name) for c in able)]
        table = [["  kernel", "ms", *(TERMS[name] for name in names), "why"]]
        for candidate in able:
            parts = [_figure(_part(candidate, name)) for name in names]
            total = "-" if candidate.ms is None else _figure(candidate.ms)
            is_chosen = candidate.kernel in (self.choice.kernel, f"{self.choice.kernel} {self.query.dtype}")
            mark = "→ " if is_chosen else "  "
            table.append([mark + candidate.kernel, total, *parts, candidate.reason])
        lines += align(table)
        if any("±" in candidate.reason for candidate in able):
            lines += ["", "±: by how much an estimate may be off, in nine cases of ten"]
        if any(_UNMEASURED in candidate.reason for candidate in able):
            lines.append(
                f"{_UNMEASURED}: nobody has, on this kind of CPU; carried over from another kernel or CPU"
            )
        refused: dict[str, list[str]] = {}
        for candidate in self.choice.candidates:
            if not _is_able(candidate):
                refused.setdefault(candidate.reason, []).append(candidate.kernel)
        if refused:
            lines += ["", "cannot run this layer:"]
            lines += [f"  {', '.join(kernels)}: {reason}" for reason, kernels in refused.items()]
        return "\n".join(lines)

    def _break_even(self) -> str:
        at = self.break_even_density
        if at == 0:
            return "sparse is chosen at no density: what does not shrink with the weights costs too much"
        if at == 1:
            return "sparse is chosen at any density"
        return f"break-even density {at:.2f}: sparse is chosen where fewer are kept"


def explain(
    layer: nn.Module | LayerQuery,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    pattern: Pattern | str | None = None,
    machine: Machine | None = None,
    quiet: bool = False,
) -> Explanation:
    """Print and return why a layer runs as it does.

    Args:
        layer: a sparse layer, a masked or pruned torch layer (its mask or its zeros tell what is kept), or a
            query.
        size: of the input: (N, H, W) for a convolution, (N,) for a linear layer; not for a query.
        dtype: of the input; that of the weights by default.
        pattern: how the zeros of a torch layer are packed; unstructured by default.
        machine: what the layer's tensors are on, by default.
        quiet: return only.

    Raises:
        ValueError, TypeError: another kind of layer, or a size that does not fit it.

    Example:
        >>> from torch import nn
        >>> conv = nn.Conv2d(8, 8, 3, padding=1)
        >>> explain(conv, (1, 6, 6), quiet=True).choice.kernel
        'dense'
    """
    query = layer if isinstance(layer, LayerQuery) else _query(layer, size, dtype, pattern)
    machine = machine or this_machine(_device_of(layer))
    at = break_even_density(query, machine)
    found = Explanation(query, machine, choose(query, machine), at)
    if not quiet:
        print(found)
    return found


def _is_able(candidate: Candidate) -> bool:
    """Whether the kernel takes the layer; of a GPU, nobody has measured how fast."""
    return candidate.estimate is not None or candidate.reason == UNMEASURED


def _part(candidate: Candidate, name: str) -> float:
    return 0.0 if candidate.estimate is None else candidate.estimate.terms.get(name, 0.0)


def _device_of(layer: nn.Module | LayerQuery) -> torch.device | None:
    if isinstance(layer, LayerQuery):
        return None
    return next((parameter.device for parameter in layer.parameters()), None)


def _query(
    layer: nn.Module, size: Sequence[int] | None, dtype: torch.dtype | None, pattern: Pattern | str | None
) -> LayerQuery:
    # Here, for the time it takes to import the package.
    from vpns_kernels.convert import freeze
    from vpns_kernels.modules import MaskedConv2d, MaskedLinear
    from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

    if not isinstance(layer, SparseConv2d | SparseLinear | nn.Conv2d | nn.Linear):
        raise TypeError(f"explain: expected a convolution or a linear layer, got {type(layer).__name__}")
    is_linear = isinstance(layer, SparseLinear | nn.Linear)
    if size is None or len(size) != (1 if is_linear else 3):
        raise ValueError(f"explain: expected size {'(N,)' if is_linear else '(N, H, W)'}, got {size}")
    if isinstance(layer, SparseConv2d | SparseLinear):
        sparse = layer
    else:
        mask = None
        if isinstance(layer, MaskedConv2d | MaskedLinear):
            # What packs a layer takes plain ones alone, which compute nothing but their convolution.
            mask, pattern, layer = layer.weight_mask(), pattern or layer.pattern, freeze(layer)
        kind = SparseLinear if is_linear else SparseConv2d
        sparse = kind.from_dense(layer, mask, pattern)  # type: ignore[arg-type]
    images, height, width = (size[0], 1, 1) if is_linear else size
    shape = (images, sparse.geometry.in_channels, height, width)
    return query_of(sparse.geometry, shape, sparse.values, dtype or sparse.values.dtype)


def _describe(query: LayerQuery, machine: Machine) -> str:
    images, height, width = query.size
    layer = query.geometry.describe(None if query.layer_class == "linear" else (height, width))
    blocks = f" {query.values_sizes[1]}x{query.values_sizes[2]}" if query.format == "block" else ""
    return (
        f"{layer}, batch {images}, {query.dtype}, "
        f"{query.format}{blocks} at density {query.density:.3g}; {machine}"
    )


def _figure(ms: float) -> str:
    return "-" if ms == 0 else f"{ms:.3g}" if ms >= 0.001 else "0"
