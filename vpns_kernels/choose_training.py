"""Which backend runs each pass of a layer in training? A pure function, as choose(): nothing is timed.

Another kernel rounds otherwise, and masks that are learned would diverge: so the same layer on the same class
of machine always gets the same backends, whatever else the machine does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vpns_kernels.choose import Candidate, Choice, Machine, choose, explain_estimate
from vpns_kernels.cost import CLASSES, LayerQuery, cost_table, estimate
from vpns_kernels.geometry import ConvGeometry

# csrc/cpu/weight_gradient.cpp takes single weights, if all are wanted, in blocks of this size.
_SCORE_BLOCK = (32, 32)
# By kernel, where it is not one of the CPU's.
_BACKENDS = {"dense": "reference", "compact": "compact", "triton": "triton"}


@dataclass(frozen=True)
class TrainingChoice:
    """What runs each pass; the kernel of a weight gradient is a row of the cost table, or "dense"."""

    forward: Choice
    input_gradient: Choice
    weight_gradient: Choice

    @property
    def backends(self) -> tuple[str, str, str]:
        """The backends that sparse and masked layers take: (forward, input gradient, weight gradient)."""
        forward, input_gradient, weight_gradient = (
            _BACKENDS.get(choice.kernel, "cpu")
            for choice in (self.forward, self.input_gradient, self.weight_gradient)
        )
        return forward, input_gradient, weight_gradient


def choose_training(
    query: LayerQuery,
    machine: Machine,
    table: Mapping[str, Any] | None = None,
    with_scores: bool = False,
) -> TrainingChoice:
    """The backends that are expected to be fastest, pass by pass.

    Args:
        query: the layer; of a masked one, with as many values as its mask keeps.
        table: of costs; the shipped one by default.
        with_scores: the weight gradient is that of all units' scores (a masked layer in search), not that of
            the kept weights.
    """
    if machine.is_gpu:
        # One rule for all passes: each reads the same lists of blocks.
        chosen = choose(query, machine)
        return TrainingChoice(chosen, chosen, chosen)
    table = cost_table() if table is None else table
    return TrainingChoice(
        choose(query, machine, table),
        choose(transposed(query), machine, table),
        _choose_weight_gradient(query, machine, table, with_scores),
    )


def transposed(query: LayerQuery) -> LayerQuery:
    """The convolution that an input gradient is, of stride 1 whatever the layer's.

    With a stride it is several, one for each remainder of rows and columns; together they multiply as often
    as this one, which has their number of outputs each and all of the filter's taps.
    """
    g, (images, height, width) = query.geometry, query.size
    outputs = [math.ceil(size / step) for size, step in zip((height, width), g.stride, strict=True)]
    reach = [(k - 1) * d for k, d in zip(g.kernel_size, g.dilation, strict=True)]
    geometry = ConvGeometry(
        g.out_channels, g.in_channels, g.kernel_size, dilation=g.dilation, groups=g.groups
    )
    first, *sizes = query.values_sizes
    if query.format == "block":
        sizes = sizes[::-1]
    elif query.format == "channel":
        first, sizes[0] = sizes[0], first
    size = (images, outputs[0] + reach[0], outputs[1] + reach[1])
    return replace(query, geometry=geometry, size=size, values_sizes=(first, *sizes))


def _choose_weight_gradient(
    query: LayerQuery, machine: Machine, table: Mapping[str, Any], with_scores: bool
) -> Choice:
    dense_row = f"dense {'scores' if with_scores else 'weight gradient'} {query.dtype}"
    dense = estimate(query, dense_row, machine.isa, machine.threads, table, machine.core)
    candidates = [Candidate(dense_row, dense, explain_estimate(dense))]
    kernel, refusal = _sparse_row(query, machine, with_scores)
    if refusal:
        candidates.append(Candidate(kernel, None, refusal))
        reason = f"dense: {refusal}"
        return Choice("dense", dense.ms, dense.ms, reason, tuple(candidates))
    # Channels: the smaller dense layer's. Scores: of all units, whatever the mask.
    asked, row = query, kernel
    if kernel == "compact":
        asked, row = _smaller(query), dense_row
    elif with_scores:
        asked = all_scores(query)
    sparse = estimate(asked, row, machine.isa, machine.threads, table, machine.core)
    candidates.append(Candidate(kernel, sparse, explain_estimate(sparse)))
    figures = f"{kernel} {sparse.ms:.3g} ms, {dense_row} {dense.ms:.3g} ms"
    if sparse.ms < dense.ms:
        return Choice(kernel, sparse.ms, dense.ms, figures, tuple(candidates))
    return Choice("dense", dense.ms, dense.ms, f"dense is faster here: {figures}", tuple(candidates))


def all_scores(query: LayerQuery) -> LayerQuery:
    """What scores' gradients cost: that of all units, those of single weights taken as blocks."""
    if query.format == "unstructured":
        query = replace(query, values_sizes=(0, *_SCORE_BLOCK))
    return query.at_density(1.0)


def _sparse_row(query: LayerQuery, machine: Machine, with_scores: bool) -> tuple[str, str]:
    """The row of the sparse weight gradient, and why it cannot run (empty where it can)."""
    if query.format == "channel":
        return (
            ("score channel", "scores of channels are no weight gradient") if with_scores else ("compact", "")
        )
    row = f"{'score' if with_scores else 'gradient'} {query.format}"
    if with_scores or query.format == "block":
        row = f"{row} {query.dtype}"
    if CLASSES.index(machine.isa) < CLASSES.index("avx2"):
        return row, "the native weight gradients need avx2"
    if query.dtype == "float64":
        return row, "the native weight gradients compute in float32"
    return row, ""


def _smaller(query: LayerQuery) -> LayerQuery:
    """Of channel weights: the dense layer of what is kept."""
    g, (rows, columns, _, _) = query.geometry, query.values_sizes[:4]
    geometry = replace(g, in_channels=max(1, columns), out_channels=max(1, rows))
    return replace(query, geometry=geometry)
