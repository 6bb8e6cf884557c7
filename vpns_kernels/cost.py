"""How long will a layer take? A few coefficients per kernel, fitted to measurements, times the layer's sizes.

An estimate is Σ coefficient · feature: multiply-adds, bytes read, laid out, written and streamed as weights,
loops, and the cost of a call, which alone does not shrink with threads. The coefficients stand in
cost_table.json, one set for each class of machine, written by bench/tune.py: an instruction set on the cores
of one family of CPUs ("avx512 amd26"). Other cores stand in where those of a machine were never measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vpns_kernels.geometry import ConvGeometry

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Instruction sets from weak to strong; a machine's class is its strongest.
CLASSES = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx")
# GFLOP/s of one core by class and instruction set, as published or measured (on CPUs with tiles, vectors
# multiply bf16 at half the rate of float32). They bridge from a measured class or kernel to one that is not.
_RATES: Mapping[str, Mapping[str, float]] = {
    "scalar": {"scalar": 4},
    "avx2": {"scalar": 4, "avx2": 100},
    "avx512": {"scalar": 4, "avx2": 100, "avx512": 200},
    "avx512_bf16": {"scalar": 4, "avx2": 115, "avx512": 115, "avx512_bf16": 230},
    "avx512_fp16": {"scalar": 4, "avx2": 120, "avx512": 240, "avx512_bf16": 121, "avx512_fp16": 472},
    "amx": {"scalar": 4, "avx2": 120, "avx512": 240, "avx512_bf16": 121, "avx512_fp16": 472, "amx": 3530},
}
# What an estimate is made of, in words.
TERMS = {
    "multiply_adds": "multiply-adds",
    "loops": "loops over outputs",
    "input": "reading the input",
    "planes": "laying out the input",
    "narrow": "channels that fill no vector",
    "output": "writing the output",
    "fresh": "mapping new memory for the output",
    "weights": "reading the weights",
    "call": "the cost of a call",
}
# Weight gradients (row names of the table that are no kernels of the forward), and what stands in for a row
# that no class of machine has.
_STAND_INS = {
    "gradient unstructured": ("unstructured",),
    "gradient block": ("block",),
    "score block": ("gradient block", "block"),
    "score unstructured": ("score block", "gradient block", "block"),
    "dense weight gradient": ("dense",),
    "dense scores": ("dense weight gradient",),
}
# Vectors of the unstructured kernels hold this many images, or pixels of one.
_LANES = 16
# An allocation of more bytes than this is mapped anew each time (glibc's largest threshold), page by page.
_MAPPED_BYTES = 32 * 1024 * 1024
# Taken where nothing tells how far the estimates are off.
_UNKNOWN_ERROR = 0.5


@dataclass(frozen=True)
class LayerQuery:
    """One layer with packed weights and its input: everything an estimate may depend on.

    Args:
        size: images, height and width of the input.
        values_sizes: sizes of the packed values; how many there are tells the format: [count] unstructured,
            [count, bk, bc] block, [kept K, kept C, R, S] channel.
        dtype: of inputs and outputs.
        weight_dtype: of the packed values.
    """

    geometry: ConvGeometry
    size: tuple[int, int, int]
    values_sizes: tuple[int, ...]
    dtype: str = "float32"
    weight_dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.values_sizes) not in (1, 3, 4) or min(self.values_sizes) < 0:
            raise ValueError(
                f"LayerQuery: expected values_sizes of 1, 3 or 4 dimensions, got {self.values_sizes}"
            )
        for dtype in (self.dtype, self.weight_dtype):
            if dtype not in BYTES:
                raise ValueError(f"LayerQuery: expected a dtype in {sorted(BYTES)}, got {dtype!r}")
        self.geometry.output_size(*self.size[1:])

    @property
    def format(self) -> str:
        """How the weights are packed: "unstructured", "block" or "channel"."""
        return {1: "unstructured", 3: "block", 4: "channel"}[len(self.values_sizes)]

    @property
    def density(self) -> float:
        """Stored fraction of the layer's units; of channels, of its weights."""
        if self.format == "channel":
            return math.prod(self.values_sizes) / math.prod(self.geometry.weight_shape)
        return self.values_sizes[0] / max(1, self._unit_count())

    def at_density(self, density: float) -> LayerQuery:
        """The same layer with another fraction kept; of channels the square root each way."""
        K, C, R, S = self.geometry.weight_shape
        if self.format == "channel":
            rows, columns = (max(1, round(size * math.sqrt(density))) for size in (K, C))
            return replace(self, values_sizes=(rows, columns, R, S))
        kept = math.floor(density * self._unit_count() + 0.5)
        return replace(self, values_sizes=(kept, *self.values_sizes[1:]))

    def _unit_count(self) -> int:
        """Weights or blocks of the dense layer."""
        K, C, R, S = self.geometry.weight_shape
        bk, bc = self.values_sizes[1:] or (1, 1)
        return math.ceil(K / self.geometry.groups / bk) * self.geometry.groups * math.ceil(C / bc) * R * S

    @property
    def layer_class(self) -> str:
        """Layers of a class are alike in what bounds them."""
        g = self.geometry
        if g.groups > 1:
            return "grouped"
        if g.kernel_size == (1, 1):
            return "linear" if self.geometry.output_size(*self.size[1:]) == (1, 1) else "pointwise"
        return "stem" if g.in_channels <= 4 else "spatial"


@dataclass(frozen=True)
class Estimate:
    """Milliseconds, in parts.

    Args:
        error: by which share of itself the estimate is off, in nine cases of ten at most.
        margin: by how much a sparse kernel's advantage over dense may be overrated, likewise.
        measured: false where coefficients were carried over from another kernel or class of machine.
    """

    terms: Mapping[str, float]
    error: float
    margin: float
    measured: bool

    @property
    def ms(self) -> float:
        """Expected milliseconds of one call: the sum of its parts."""
        return sum(self.terms.values())

    @property
    def bound_by(self) -> str:
        """The largest part, in words."""
        return TERMS[max(self.terms, key=lambda name: self.terms[name])]


def features(query: LayerQuery, kernel: str) -> dict[str, float]:
    """What the cost of a kernel depends on, in millions (of operations, of bytes); `call` is 1."""
    g = query.geometry
    images, height, width = query.size
    P, Q = g.output_size(height, width)
    K, C, R, S = g.weight_shape
    x_bytes, pixels = BYTES[query.dtype], images * P * Q
    in_channels, out_channels = g.in_channels, K
    if kernel.startswith("dense"):
        found = {
            "multiply_adds": pixels * K * C * R * S,
            "input": images * in_channels * height * width * x_bytes,
            "output": pixels * K * x_bytes,
            "fresh": _fresh(pixels * K * x_bytes),
            "weights": K * C * R * S * x_bytes,
        }
        return {name: value / 1e6 for name, value in found.items()} | {"call": 1.0}
    stored = math.prod(query.values_sizes)
    if query.format == "block":
        # Blocks wider than the layer are cut (a stem's).
        stored = math.prod(query.values_sizes[:2]) * min(query.values_sizes[2], C)
    if query.format == "channel":
        out_channels, in_channels = query.values_sizes[:2]
    half_planes = kernel.endswith(("amx", "bf16", "fp16")) and x_bytes == 2
    plane_pixels = math.prod(_plane_extent(g, axis, size) for axis, size in enumerate((P, Q)))
    in_lanes = kernel.startswith(("unstructured", "gradient unstructured"))
    computed = _computed_pixels(query, P, Q) if in_lanes else pixels
    found = {
        "multiply_adds": computed * stored,
        "loops": computed * out_channels * (C if query.format == "unstructured" else 1),
        "input": images * in_channels * height * width * x_bytes,
        "planes": images * in_channels * plane_pixels * (2 if half_planes else 4),
        # Of each group, what is left of eights is laid out one by one (a stem, narrow groups).
        "narrow": images * plane_pixels * g.groups * (C % 8) * 4,
        "output": pixels * K * x_bytes,
        "fresh": _fresh(pixels * K * x_bytes),
        "weights": stored * (8 if query.format == "unstructured" else BYTES[query.weight_dtype]),
    }
    return {name: value / 1e6 for name, value in found.items()} | {"call": 1.0}


def estimate(
    query: LayerQuery, kernel: str, isa: str, threads: int, table: Mapping[str, Any], core: str = ""
) -> Estimate:
    """How long this kernel takes for this layer on a machine of class `isa`.

    Args:
        kernel: a name of the dispatch table, "compact", or "dense <dtype>".
        table: as cost_table() returns it.
        core: of the machine, where the table may hold costs of its own.
    """
    source, row_name, is_measured = _find_row(kernel, isa, table, core)
    row = table["classes"][source]["kernels"][row_name]
    coefficients = row["layers"].get(query.layer_class, row["layers"]["any"])
    scale = 1.0
    if not is_measured:
        scale = _rate(row_name, _isa_of_class(source)) / _rate(kernel, isa)
    terms = {}
    for name, value in features(query, kernel).items():
        ms = coefficients.get(name, 0.0) * value
        if name == "multiply_adds":
            ms *= scale
        terms[name] = ms if name == "call" else ms / threads
    error, margin = row["error"]["p90"], row["error"].get("margin", row["error"]["p90"])
    if not is_measured:
        error, margin = max(error, _UNKNOWN_ERROR), max(margin, _UNKNOWN_ERROR)
    return Estimate(terms, error, margin, is_measured)


@cache
def cost_table() -> Mapping[str, Any]:
    """The table that is shipped with the package."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("cost_table.json").read_text())
    if table["schema_version"] != 1:
        raise ValueError(f"cost_table: expected schema_version 1, got {table['schema_version']}")
    return table


def class_name(isa: str, core: str) -> str:
    """The table's name of an instruction set on the cores of one family."""
    return f"{isa} {core}".strip()


def nearest_class(isa: str, classes: Sequence[str], core: str = "") -> str:
    """The measured class itself, or the nearest weaker one, or else the weakest; these cores' first."""
    mine = class_name(isa, core)
    # Of others the table's first, whose cores the rates above are of.
    order = sorted(reversed(classes), key=lambda name: (_strength(name), name == mine))
    weaker = [name for name in order if _strength(name) <= _strength(isa)]
    return weaker[-1] if weaker else order[0]


def _strength(name: str) -> int:
    return CLASSES.index(_isa_of_class(name))


def _isa_of_class(name: str) -> str:
    return name.partition(" ")[0]


def _fresh(size: int) -> int:
    return size if size > _MAPPED_BYTES else 0


def _plane_extent(g: ConvGeometry, axis: int, outputs: int) -> int:
    """Rows (columns) of all stride phases together, as csrc/cpu/planes.h lays them out."""
    taps, stride, dilation = g.kernel_size[axis], g.stride[axis], g.dilation[axis]
    phases = {tap * dilation % stride for tap in range(taps)}
    return len(phases) * (outputs + (taps - 1) * dilation // stride)


def _computed_pixels(query: LayerQuery, P: int, Q: int) -> int:
    """Output pixels with the lanes that hold nothing: whole groups of images, then pixels of the rest."""
    g, images = query.geometry, query.size[0]
    rest = images % _LANES
    columns = Q + (g.kernel_size[1] - 1) * g.dilation[1] // g.stride[1]
    vectors = math.ceil(((P - 1) * columns + Q) / _LANES)
    return (images - rest) * P * Q + rest * vectors * _LANES


def _find_row(kernel: str, isa: str, table: Mapping[str, Any], core: str) -> tuple[str, str, bool]:
    """Class and name of the coefficients to use, and whether they are this kernel's on this class."""
    classes = table["classes"]
    mine = class_name(isa, core)
    if mine in classes and kernel in classes[mine]["kernels"]:
        return mine, kernel, True
    having = [name for name in classes if kernel in classes[name]["kernels"]]
    alike = [name for name in having if _isa_of_class(name) == isa or kernel.startswith(tuple(_STAND_INS))]
    source = nearest_class(isa, alike or list(classes), core)
    names = list(classes[source]["kernels"])
    if kernel in names:
        return source, kernel, False
    alike = [name for prefix in _families(kernel) for name in names if name.startswith(prefix)]
    # The kernel of the nearest instruction set stands in.
    position = CLASSES.index(_isa_of(kernel, isa))
    best = min(alike, key=lambda name: abs(CLASSES.index(_isa_of(name, _isa_of_class(source))) - position))
    return source, best, False


def _families(kernel: str) -> tuple[str, ...]:
    for row, stand_ins in _STAND_INS.items():
        if kernel.startswith(row):
            dense = (f"dense {kernel.rpartition(' ')[2]}", "dense float32")
            return (row, *(dense if stand_ins == ("dense",) else stand_ins))
    family = kernel.replace(" ", "_").partition("_")[0]
    families = {
        "channel": ("channel", "block"),
        "compact": ("compact", "dense float32"),
        "depthwise": ("depthwise", "unstructured"),
        "grouped": ("grouped", "block"),
    }
    return families.get(family, (family,))


def _isa_of(kernel: str, isa: str) -> str:
    """The instruction set that multiplies: in a kernel's name, or what there is for the dtype."""
    if kernel.startswith(("dense", *_STAND_INS)) or kernel == "compact":
        limits = {"bfloat16": CLASSES[-1], "float16": "avx512_fp16"}
        limit = limits.get(kernel.rpartition(" ")[2], "avx512")
        usable = [name for name in _RATES[isa] if CLASSES.index(name) <= CLASSES.index(limit)]
        return max(usable, key=lambda name: _RATES[isa][name])
    return kernel.partition("_")[2] or "scalar"


def _rate(kernel: str, isa: str) -> float:
    known = _RATES[isa]
    rate = known.get(_isa_of(kernel, isa), max(known.values()))
    return rate / 2 if kernel.endswith("float64") else rate
