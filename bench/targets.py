"""Which single-layer goals are met? Rows of {name, value, wanted, met} from the rows of a report.

The value counts conversion at the door; `packed` beside it counts products alone, as between layers that keep
the kernel's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]

GOAL_BATCH = 16
# Pattern, dtypes that count, opponent, and the wanted ratio by density. On a CPU without bf16 instructions
# torch's bf16 is no opponent, so the fastest of all stands beside it.
GOALS: Sequence[tuple[str, tuple[str, ...], str, dict[float, float]]] = (
    ("unstructured", ("float32",), "torch float32", {0.2: 3.7, 0.1: 6.0, 0.05: 9.5}),
    ("unstructured", ("bfloat16", "float16"), "torch bfloat16", {0.2: 1.2, 0.1: 2.0, 0.05: 3.0}),
    ("block", ("float32", "bfloat16"), "torch float32", {0.2: 3.0, 0.1: 5.0, 0.05: 8.0}),
    ("block", ("float32", "bfloat16"), "torch bfloat16", {0.2: 3.0, 0.1: 5.0, 0.05: 8.0}),
    ("block", ("float32", "bfloat16"), "best dense", {0.2: 3.0, 0.1: 5.0, 0.05: 8.0}),
)
# Of what the kept work and traffic allow.
LEAST_SHARE = 0.6
# Of the ratio of FLOPs, for channels.
LEAST_CHANNEL_SHARE = 0.9
# An interval of fewer rounds is no evidence.
LEAST_ROUNDS = 30
# Where a layer chose dense it is timed against itself.
SAME_FRAC = 0.05


def targets(rows: Iterable[Row]) -> list[Row]:
    """All goals, those without rows as not met."""
    rows = list(rows)
    sparse = [row for row in rows if row["asked"] != "auto"]
    judged = [r for r in sparse if r["network"] == "resnet18" and r["kernel_size"] == [3, 3]]
    judged = [r for r in judged if r["batch"] == GOAL_BATCH]
    found = []
    for pattern, dtypes, opponent, wanted in GOALS:
        of_pattern = [r for r in judged if _family(r) == pattern and r["dtype"] in dtypes]
        for density, ratio in wanted.items():
            at_density = [r for r in of_pattern if r["density"] == density]
            found.append(_ratio_goal(pattern, density, opponent, ratio, at_density))
    return [*found, *_channel_goals(judged), _roofline_goal(judged), *_never_slower_goals(rows)]


def _ratio_goal(pattern: str, density: float, opponent: str, wanted: float, rows: Sequence[Row]) -> Row:
    """The geometric mean over the layers, of the form that is best over all; the least of them beside it."""
    best = _best_form(rows, lambda row: _ratio(row, opponent))
    value = None if best is None else geometric_mean(best[1])
    return {
        "name": f"{pattern} at density {density:g} against {opponent}, ResNet-18's 3x3 layers, batch 16",
        "form": None if best is None else best[0],
        "value": value,
        "packed": None if best is None else _mean([_packed_ratio(r, opponent) for r in best[2]]),
        "least": None if best is None else min(best[1]),
        "wanted": f">= {wanted:g}",
        "met": value is not None and value >= wanted,
    }


def _channel_goals(rows: Sequence[Row]) -> list[Row]:
    """Speed-up over the ratio of FLOPs, in each dtype against dense in the same."""
    found = []
    for dtype in ("float32", "bfloat16"):
        mine = [r for r in rows if _family(r) == "channel" and r["dtype"] == dtype and r["density"] < 1]
        shares = [ratio * r["weight_density"] for r in mine if (ratio := _ratio(r, f"torch {dtype}"))]
        value = _mean(shares)
        found.append(
            {
                "name": f"channel over the ratio of FLOPs, {dtype}, ResNet-18's 3x3 layers, batch 16",
                "form": None,
                "value": value,
                "packed": None,
                "least": min(shares, default=None),
                "wanted": f">= {LEAST_CHANNEL_SHARE:g}",
                "met": value is not None and value >= LEAST_CHANNEL_SHARE,
            }
        )
    return found


def _roofline_goal(rows: Sequence[Row]) -> Row:
    shares = [row["roofline"]["share"] for row in rows if row.get("roofline")]
    value = min(shares, default=None)
    return {
        "name": "each layer: share of the lower of its compute and traffic roofline, least",
        "form": None,
        "value": value,
        "packed": None,
        "least": value,
        "mean": _mean(shares),
        "wanted": f">= {LEAST_SHARE:g}",
        "met": value is not None and value >= LEAST_SHARE,
    }


def _never_slower_goals(rows: Sequence[Row]) -> list[Row]:
    """The lower end of the interval of dense / auto, in the layer's own dtype."""
    found = []
    for is_dense in (False, True):
        mine = [r for r in rows if r["asked"] == "auto" and (r["kernel"] == "dense") == is_dense]
        mine = [r for r in mine if r["sparse"]["rounds"] >= LEAST_ROUNDS]
        ratios = {_place(r): r["ratios"].get(f"torch {r['dtype']}", {}).get("low") for r in mine}
        lows = {place: low for place, low in ratios.items() if low is not None}
        wanted = 1 - SAME_FRAC if is_dense else 1.0
        value = min(lows.values(), default=None)
        what = "dense is chosen" if is_dense else "sparse is chosen"
        found.append(
            {
                "name": f"auto is never slower than dense where {what}: least lower end of 95 %",
                "form": None if value is None else min(lows, key=lambda place: lows[place]),
                "value": value,
                "packed": None,
                "least": value,
                "rows": len(lows),
                "slower": sorted(place for place, low in lows.items() if low < wanted),
                "wanted": f">= {wanted:g}",
                "met": value is not None and value >= wanted,
            }
        )
    return found


def _best_form(
    rows: Sequence[Row], ratio_of: Callable[[Row], float | None]
) -> tuple[str, list[float], list[Row]] | None:
    """Pattern and dtype with the best mean, with its ratios and rows."""
    by_form: dict[str, tuple[list[float], list[Row]]] = {}
    for row in rows:
        ratio = ratio_of(row)
        if ratio is not None:
            ratios, members = by_form.setdefault(f"{row['pattern']} {row['dtype']}", ([], []))
            ratios.append(ratio)
            members.append(row)
    if not by_form:
        return None
    best = max(by_form, key=lambda form: geometric_mean(by_form[form][0]))
    return best, *by_form[best]


def _ratio(row: Row, opponent: str) -> float | None:
    name = row["best_dense"] if opponent == "best dense" else opponent
    found: float | None = row["ratios"].get(name, {}).get("median")
    return found


def _packed_ratio(row: Row, opponent: str) -> float | None:
    ratio, packed_ms = _ratio(row, opponent), row.get("packed_ms")
    if ratio is None or packed_ms is None:
        return None
    full: float = ratio * row["sparse"]["median_ms"] / packed_ms
    return full


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return geometric_mean([value for value in values if value is not None])


def _family(row: Row) -> str:
    family: str = row["pattern"].split(":")[0]
    return family


def _place(row: Row) -> str:
    form = f"{row['pattern']} {row['density']:g} {row['dtype']}"
    return f"{row['network']} {row['layer']} batch {row['batch']} {form}"
