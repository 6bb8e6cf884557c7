"""Which kernel runs a layer, and is it sparse at all? A pure function of the layer, the machine and a table.

Nothing is timed here: the same layer on the same class of machine always gets the same kernel. Dense (torch)
is a candidate as every other, and sparse is chosen only where it wins by more than the estimates may be off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.choose_gpu import UNMEASURED, gpu_kernel, gpu_refusals
from vpns_kernels.cost import Estimate, LayerQuery, cost_table, estimate
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._cpu import multiplied_dtype

GPU = "gpu"
# (kernel, why it does not take the layer, or empty), in order of preference.
Refusals = Callable[[LayerQuery], Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class Machine:
    """What a choice may know of a machine.

    Args:
        isa: its class: the strongest usable instruction set, or "gpu".
        core: what designed its cores ("amd26"), of which the table may hold costs of their own.
        refusals: its kernels, each with the reason why it does not take a layer.
    """

    isa: str
    threads: int
    refusals: Refusals
    core: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, of which no costs are known."""
        return self.isa == GPU

    def __str__(self) -> str:
        return "a GPU" if self.is_gpu else f"{self.isa}, {self.threads} threads"


@dataclass(frozen=True)
class Candidate:
    """A kernel with its estimate, or with the reason why it has none: it cannot run, or nobody measured."""

    kernel: str
    estimate: Estimate | None
    reason: str

    @property
    def ms(self) -> float | None:
        """Expected milliseconds of one call; None where there is no estimate."""
        return None if self.estimate is None else self.estimate.ms


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a layer ("dense" for torch), what was expected of it (NaN: unknown), and why."""

    kernel: str
    est_ms: float
    dense_ms: float
    reason: str
    candidates: tuple[Candidate, ...]

    @property
    def speedup(self) -> float:
        """Expected, over dense in the input's own dtype."""
        return self.dense_ms / self.est_ms


def choose(
    query: LayerQuery,
    machine: Machine,
    table: Mapping[str, Any] | None = None,
    may_be_dense: bool = True,
) -> Choice:
    """The kernel that is expected to be fastest; dense unless sparse wins by more than the uncertainty.

    Args:
        table: of costs; the shipped one by default.
        may_be_dense: where false, the best sparse kernel even if dense is faster (dense where none can run).
    """
    if machine.is_gpu:
        return _choose_on_gpu(query, machine)
    table = cost_table() if table is None else table
    candidates = _candidates(query, machine, table)
    dense = next(c for c in candidates if c.kernel == f"dense {query.dtype}")
    able = [c for c in candidates if c.estimate is not None and not c.kernel.startswith("dense")]
    for last_resort in ("scalar", "compact"):
        able = [c for c in able if c.kernel != last_resort] or able
    best = min(able, key=lambda c: c.estimate.ms if c.estimate else 0.0, default=None)
    assert dense.estimate is not None
    dense_ms = dense.estimate.ms
    if best is None or best.estimate is None:
        return Choice("dense", dense_ms, dense_ms, "dense: no sparse kernel takes this layer", candidates)
    sparse, margin = best.estimate, best.estimate.margin
    if not dense.estimate.measured:
        margin = max(margin, dense.estimate.error)
    figures = f"{best.kernel} {_ms(sparse.ms)}, dense {_ms(dense_ms)} ({query.dtype})"
    carried = "" if sparse.measured and dense.estimate.measured else "; measured: false"
    bound = f"; bound by {sparse.bound_by}{carried}"
    if sparse.ms * (1 + margin) < dense_ms or not may_be_dense:
        reason = f"{figures}: {dense_ms / sparse.ms:.1f}x{bound}"
        return Choice(best.kernel, sparse.ms, dense_ms, reason, candidates)
    if sparse.ms < dense_ms:
        reason = f"dense: {figures}, less apart than estimates may be off ({margin:.0%}){bound}"
    else:
        reason = f"dense is faster here: {figures}{bound}"
    return Choice("dense", dense_ms, dense_ms, reason, candidates)


def break_even_density(query: LayerQuery, machine: Machine, table: Mapping[str, Any] | None = None) -> float:
    """Up to which kept fraction a sparse kernel is chosen for a layer of these sizes; 0 where never."""
    if choose(query.at_density(1.0), machine, table).kernel != "dense":
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        is_sparse = choose(query.at_density(middle), machine, table).kernel != "dense"
        low, high = (middle, high) if is_sparse else (low, middle)
    return low


def query_of(geometry: ConvGeometry, shape: Sequence[int], values: Tensor, dtype: torch.dtype) -> LayerQuery:
    """The query of a packed weight for inputs [N, C, H, W] of that shape and dtype."""
    return query_of_kept(geometry, shape, values.shape, values, dtype)


def query_of_kept(
    geometry: ConvGeometry, shape: Sequence[int], sizes: Sequence[int], weight: Tensor, dtype: torch.dtype
) -> LayerQuery:
    """The same of a weight that is not packed yet, and of the sizes that its values would have."""
    images, _, height, width = shape
    weight_dtype = weight.dtype
    if weight.device.type == "cpu":
        weight_dtype = multiplied_dtype(weight_dtype, dtype, is_single=len(sizes) == 1)
    names = dtype_name(dtype), dtype_name(weight_dtype)
    return LayerQuery(geometry, (images, height, width), tuple(sizes), *names)


def this_machine(device: torch.device | None = None) -> Machine:
    """The machine that runs this, with torch's number of threads; the GPU, where tensors are on one."""
    if device is not None and device.type != "cpu":
        return Machine(GPU, 0, gpu_refusals)
    if native.why_not() is not None:
        return Machine("scalar", torch.get_num_threads(), lambda query: [("native", str(native.why_not()))])
    library = native.library()
    return Machine(library.isa_list()[-1], torch.get_num_threads(), _native_refusals, library.cpu_core())


def _native_refusals(query: LayerQuery) -> Sequence[tuple[str, str]]:
    g = query.geometry
    K, _, R, S = g.weight_shape
    images, height, width = query.size
    sizes = [images, g.in_channels, height, width, K, R, S, *g.output_size(height, width)]
    sizes += [*g.stride, *g.padding, *g.dilation, g.groups]
    found: list[tuple[str, str]] = native.library().sparse_conv2d_refusals(
        sizes, list(query.values_sizes), query.weight_dtype, query.dtype
    )
    return found


def _choose_on_gpu(query: LayerQuery, machine: Machine) -> Choice:
    """By sizes alone."""
    refusals = machine.refusals(query)
    kernel, reason = gpu_kernel(query, refusals)
    candidates = [Candidate(name, None, refusal or UNMEASURED) for name, refusal in refusals]
    candidates.append(Candidate(f"dense {query.dtype}", None, UNMEASURED))
    return Choice(kernel, math.nan, math.nan, reason, tuple(candidates))


def _candidates(query: LayerQuery, machine: Machine, table: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """Every kernel, compact for channels, and dense in the dtypes that torch computes in."""
    found = []
    refusals = list(machine.refusals(query))
    if query.format == "channel":
        refusals.append(("compact", ""))
    for kernel, refusal in refusals:
        expected = (
            None if refusal else estimate(query, kernel, machine.isa, machine.threads, table, machine.core)
        )
        reason = refusal or explain_estimate(expected)
        found.append(Candidate(kernel, expected, reason))
    for dtype in dict.fromkeys((query.dtype, "float32", "bfloat16")):
        cast = LayerQuery(query.geometry, query.size, query.values_sizes, dtype, query.weight_dtype)
        expected = estimate(cast, f"dense {dtype}", machine.isa, machine.threads, table, machine.core)
        note = "" if dtype == query.dtype else f"; not chosen for {query.dtype} inputs"
        found.append(Candidate(f"dense {dtype}", expected, explain_estimate(expected) + note))
    return tuple(found)


def explain_estimate(expected: Estimate | None) -> str:
    """What bounds it, and how far it may be off."""
    assert expected is not None
    carried = "" if expected.measured else "; measured: false"
    return f"bound by {expected.bound_by}, ± {expected.error:.0%}{carried}"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"
