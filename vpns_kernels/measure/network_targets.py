"""Which goals for whole networks are met? Rows of {name, value, wanted, met} from the cells of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# No network at this density or below may be more than 5 % slower than the best dense engine.
_LEAST_SPARSE_DENSITY, _LEAST_RATIO = 0.3, 0.95
_LEAST_FLOPS_FRAC = 0.9
_LEAST_CHANNEL_SHARE = 0.9
_LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass(frozen=True)
class Goal:
    """A wanted speed-up of a network by density, over the fastest dense engine of a kind.

    Args:
        kind: "best", or the type at the end of an engine's name.
        batches: at which it counts.
    """

    model: str
    pattern: str
    kind: str
    batches: tuple[int, ...]
    wanted: dict[float, float]


GOALS: Sequence[Goal] = (
    Goal("resnet50", "block", "best", (32,), {0.2: 2.5, 0.1: 3.4, 0.05: 3.8}),
    Goal("resnet50", "block", "best", (16,), {0.1: 3.0}),
    Goal("resnet50", "block", "best", (1,), {0.1: 2.0}),
    Goal("resnet50", "block", "int8", (32,), {0.1: 2.0}),
    Goal("resnet18", "block", "best", (16, 32), {0.2: 3.0, 0.1: 4.0, 0.05: 5.0}),
    Goal("vgg16_bn", "block", "best", (16, 32), {0.2: 3.0, 0.1: 4.5, 0.05: 5.5}),
    Goal("resnet50", "unstructured", "float32", (16, 32), {0.1: 2.5}),
    Goal("resnet18", "unstructured", "float32", (16, 32), {0.1: 2.5}),
    Goal("vgg16_bn", "unstructured", "float32", (16, 32), {0.1: 2.5}),
)


def network_targets(cells: Iterable[Row]) -> list[Row]:
    """The rows of all goals that a cell (one network, pattern, density, batch and size) bears on."""
    found: list[Row] = []
    for cell in cells:
        # The goals of networks by name are a CPU's.
        for goal in GOALS if cell["device"] == "cpu" else ():
            wanted = goal.wanted.get(cell["density"])
            is_meant = (cell["model"], cell["family"]) == (goal.model, goal.pattern)
            if is_meant and wanted is not None and cell["batch"] in goal.batches and cell["size"] == 224:
                found.append(_speed_row(cell, goal.kind, wanted))
        found += _rows_of_any(cell)
    return found


def _rows_of_any(cell: Row) -> list[Row]:
    """Of every network."""
    rows = []
    if cell["density"] <= _LEAST_SPARSE_DENSITY:
        low = cell["speedup_low"] if cell["best_dense_counts"] else None
        name = f"{_place(cell)}: never slower than the best dense, lower end of 95 %"
        rows.append(_row(name, low, _LEAST_RATIO))
    if cell["family"] == "block" and cell["density"] <= _LEAST_SPARSE_DENSITY:
        rows.append(
            _row(f"{_place(cell)}: FLOPs that ran sparse", cell["sparse_flops_frac"], _LEAST_FLOPS_FRAC)
        )
    if cell["family"] == "channel" and cell["density"] < 1:
        share = cell["speedup"] / cell["flops_ratio"] if cell["best_dense_counts"] else None
        rows.append(_row(f"{_place(cell)}: over the ratio of FLOPs", share, _LEAST_CHANNEL_SHARE))
    limit = _LARGEST_ERROR[cell["sparse_dtype"]]
    error = cell["max_rel_err"]
    name = f"{_place(cell)}: largest error, of the largest output"
    rows.append({"name": name, "value": error, "wanted": f"<= {limit:g}", "met": error <= limit})
    return rows


def _speed_row(cell: Row, kind: str, wanted: float) -> Row:
    name = f"{_place(cell)}: over the {'best dense' if kind == 'best' else f'best dense {kind}'}"
    value: float | None
    if kind == "best":
        value = cell["speedup"] if cell["best_dense_counts"] else None
    else:
        mine = {n: r["median"] for n, r in cell["against"].items() if n.split()[-1] == kind}
        value = min(mine.values(), default=None)
    return _row(name, value, wanted)


def _row(name: str, value: float | None, wanted: float) -> Row:
    return {
        "name": name,
        "value": value,
        "wanted": f">= {wanted:g}",
        "met": value is not None and value >= wanted,
    }


def _place(cell: Row) -> str:
    network = f"{cell['model']}, {cell['pattern']} at density {cell['density']:g}"
    return f"{network}, {cell['size']} px, batch {cell['batch']}"
