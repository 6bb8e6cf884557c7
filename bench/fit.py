"""From measured rows to coefficients: non-negative least squares on the relative error, and their errors.

A coefficient is the time of a million of its feature on one thread; those of a class of layers come from its
own rows where there are enough. The errors are those of rows whose layer was left out of the fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vpns_kernels import ConvGeometry
from vpns_kernels.cost import LayerQuery, features

# A class of layers with fewer different layers than this shares the coefficients of all.
LEAST_LAYERS = 4
# Sparse and dense within this factor of one another are what a choice can get wrong.
NEAR = 3.0


def fit_kernels(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{kernel: {layers: {class: coefficients}, error: {median, p90, margin}, rows}} of one class of machine.

    Of rows that were measured more than once the least time counts.
    """
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        known = best.setdefault(_key(row), row)
        if row["ms"] < known["ms"]:
            best[_key(row)] = row
    rows = list(best.values())
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    fits = {kernel: _fit_kernel(kernel, [r for r in rows if r["kernel"] == kernel]) for kernel in kernels}
    expected = {key: ms for _, by_key in fits.values() for key, ms in by_key.items()}
    for kernel, (fit, _) in fits.items():
        margin = _margin([r for r in rows if r["kernel"] == kernel], best, expected)
        if margin is not None:
            fit["error"]["margin"] = margin
    return {kernel: fit for kernel, (fit, _) in fits.items()}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["cell"], row["kernel"], row["dtype"], tuple(row["values_sizes"]))


def _margin(
    rows: Sequence[dict[str, Any]], best: dict[tuple[Any, ...], dict[str, Any]], expected: dict[Any, float]
) -> float | None:
    """By how much more than expected sparse / dense takes in one of ten rows: what sparse has to win by."""
    excess = []
    for row in rows:
        dense = (row["cell"], f"dense {row['dtype']}", row["dtype"], (0,))
        if dense in best and not row["kernel"].startswith("dense"):
            measured = row["ms"] / best[dense]["ms"]
            # Where one is far ahead nothing hangs on it.
            if 1 / NEAR < measured < NEAR:
                excess.append(measured / (expected[_key(row)] / expected[dense]) - 1)
    return round(max(0.0, float(np.quantile(excess, 0.9))), 3) if excess else None


def to_query(row: dict[str, Any]) -> LayerQuery:
    """The query of a row, as tune.py writes it."""
    geometry = ConvGeometry(**row["geometry"])
    return LayerQuery(
        geometry, tuple(row["size"]), tuple(row["values_sizes"]), row["dtype"], row["weight_dtype"]
    )


def _fit_kernel(
    kernel: str, rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[tuple[Any, ...], float]]:
    """The coefficients, and what each row would be expected to take by a fit that has not seen its layer."""
    queries = [to_query(row) for row in rows]
    found = [features(query, kernel) for query in queries]
    names = list(found[0])
    threads = np.array([row["threads"] for row in rows], dtype=float)
    # All but the cost of a call is shared among the threads.
    sizes = np.array([[f[name] for name in names] for f in found])
    sizes[:, [name != "call" for name in names]] /= threads[:, None]
    times = np.array([row["ms"] for row in rows])
    classes = np.array([query.layer_class for query in queries])
    layers = np.array([str(query.geometry) for query in queries])
    expected = _left_out(sizes, times, classes, layers)
    error = np.abs(expected / times - 1)
    coefficients = {
        name: dict(zip(names, (float(f"{value:.4g}") for value in values), strict=True))
        for name, values in _solve_classes(sizes, times, classes, layers).items()
    }
    fit = {
        "layers": coefficients,
        "error": {
            "median": round(float(np.median(error)), 3),
            "p90": round(float(np.quantile(error, 0.9)), 3),
        },
        "rows": len(rows),
    }
    return fit, {_key(row): float(ms) for row, ms in zip(rows, expected, strict=True)}


def _left_out(sizes: Any, times: Any, classes: Any, layers: Any) -> Any:
    """The estimate of each row by a fit that has not seen its layer."""
    expected = np.empty_like(times)
    for layer in np.unique(layers):
        out = layers == layer
        known = ~out if (~out).any() else out
        solved = _solve_classes(sizes[known], times[known], classes[known], layers[known])
        for i in np.flatnonzero(out):
            expected[i] = sizes[i] @ solved.get(classes[i], solved["any"])
    return expected


def _solve_classes(sizes: Any, times: Any, classes: Any, layers: Any) -> dict[str, Any]:
    solved = {"any": _solve(sizes, times)}
    for name in np.unique(classes):
        mine = classes == name
        if len(np.unique(layers[mine])) >= LEAST_LAYERS:
            solved[str(name)] = _solve(sizes[mine], times[mine])
    return solved


def _solve(sizes: Any, times: Any) -> Any:
    from scipy.optimize import nnls

    relative = sizes / times[:, None]
    # Columns of one length, so that the solver's tolerance means the same for all.
    scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-12)
    return nnls(relative / scale, np.ones(len(times)))[0] / scale


def worst(rows: Iterable[dict[str, Any]], table: dict[str, Any], count: int = 10) -> list[str]:
    """The rows that the coefficients miss by most, for a look."""
    from vpns_kernels.cost import estimate

    found = []
    for row in rows:
        expected = estimate(to_query(row), row["kernel"], row["isa"], row["threads"], table, row["core"])
        found.append((abs(expected.ms / row["ms"] - 1), expected.ms, row))
    found.sort(key=lambda item: -item[0])
    return [
        f"{off:.0%}: {row['kernel']} {row['layer']} batch {row['size'][0]} density {row['density']:g}"
        f" {row['dtype']}: {row['ms']:.3g} ms, expected {ms:.3g}"
        for off, ms, row in found[:count]
    ]
