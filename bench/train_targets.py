"""Which goals of training are met? Rows of {name, value, wanted, met, why} from the rows of a report.

A value is None where a figure is missing, and `why` says which. A ratio is that to the fastest of the engines
that count; where one of them was not measured the goal is not met, and `why` names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]

BATCH, CANVAS = 32, 224
_UNSTRUCTURED, _BLOCKS = ("unstructured", "float32"), ("block:32x32", "bfloat16")
# Where a goal leaves our dtype free (scores are float32 in both) the better counts.
_EITHER = (_UNSTRUCTURED, ("unstructured", "bfloat16"))
_FLOAT32 = ("torch float32", "torch.compile float32")
_BFLOAT16 = ("torch bfloat16", "torch.compile bfloat16")
# What is wanted by name: stage, variant, our forms (pattern, dtype), engines that count, ratio by density.
_Step = tuple[str, str, str, Sequence[tuple[str, str]], Sequence[str], Mapping[float, float]]
STEPS: Sequence[_Step] = (
    (
        "training step, fixed mask",
        "tune",
        "framed",
        (_UNSTRUCTURED,),
        _FLOAT32,
        {0.2: 2.2, 0.1: 3.2, 0.05: 4.0},
    ),
    ("training step, fixed mask", "tune", "framed", (_BLOCKS,), _BFLOAT16, {0.1: 2.0}),
    ("training step, search", "search", "framed", (_BLOCKS,), _BFLOAT16, {0.1: 1.5}),
    ("search iteration, two updates", "search", "released", (_BLOCKS,), _FLOAT32[:1], {0.1: 4.0}),
    ("search iteration, two updates", "search", "released", (_BLOCKS,), _BFLOAT16[1:], {0.1: 1.8}),
    ("search iteration, two updates", "search", "released", _EITHER, _FLOAT32[:1], {0.1: 2.5}),
)
LAYERS = {
    "input_gradient": {0.2: 3.5, 0.1: 5.5, 0.05: 9.0},
    "weight_gradient": {0.2: 2.5, 0.1: 4.5, 0.05: 8.0},
}
PROMPT = {"forward": 2.0, "prompt_gradient": 10.0}
_NAMES = {
    "forward": "forward",
    "prompt_gradient": "prompt gradient",
    "input_gradient": "input gradient",
    "weight_gradient": "kept-weight gradient",
}
# Of ResNet-18, masked whole.
SCORES = 11_678_912
# Of a float32 canvas of the whole batch: one in bfloat16 would be a half already.
MOST_CANVAS = 0.5
RUNS_PER_HOUR, AT_ONCE, SPARSEPROP, SELECT_MS = 3.0, 0.95, 2.5, 8.0
# Epochs of search and of tuning in a run by default.
_EPOCHS = {"search": 60, "tune": 30}


def targets(parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """All goals, in the order of their tables.

    Args:
        parts: rows of "steps", "layers", "ops" and "runs"; parts that were not measured may be missing.
    """
    steps, layers, ops, runs = (list(parts.get(name, ())) for name in ("steps", "layers", "ops", "runs"))
    found = [_step_goal(steps, goal, density) for goal in STEPS for density in goal[5]]
    found += [_layer_goal(layers, phase, density) for phase in LAYERS for density in LAYERS[phase]]
    found += [_sparseprop_goal(layers), *_prompt_goals(ops), _selection_goal(ops)]
    return [*found, _embedded_goal(runs), _large_goal(steps), _at_once_goal(runs)]


def _goal(name: str, value: float | None, wanted: float, why: str | None = None, **more: Any) -> Row:
    is_met = value is not None and value >= wanted and why is None
    return {"name": name, "value": value, "wanted": f">= {wanted:g}", "met": is_met, "why": why} | more


def _most(name: str, value: float | None, wanted: float, why: str | None = None, **more: Any) -> Row:
    is_met = value is not None and value <= wanted
    return {"name": name, "value": value, "wanted": f"<= {wanted:g}", "met": is_met, "why": why} | more


def _step_goal(rows: Sequence[Row], goal: _Step, density: float) -> Row:
    """The best of our forms; of those that were measured."""
    what, stage, variant, forms, engines, wanted = goal
    against = " and ".join(engines)
    pattern, dtypes = forms[0][0], " or ".join(dtype for _, dtype in forms)
    name = f"{what}: {pattern} {dtypes} at density {density:g} against {against}"
    by_form = {" ".join(form): _find_ours(rows, stage, variant, *form, density) for form in forms}
    found = {form: row for form, row in by_form.items() if row is not None}
    if not found:
        why = f"no row of {stage} {variant}, batch {BATCH}, {CANVAS} px, in this form"
        return _goal(name, None, wanted[density], why)
    missing = [e for e in engines if any(e not in row["ratios"] for row in found.values())]
    why = None
    if missing:
        reasons = {row["arm"]: row["why_not"] for row in rows if row["who"] != "ours" and row["why_not"]}
        why = "; ".join(
            f"{engine}: {reasons.get(engine, 'not measured (--opponents)')}" for engine in missing
        )
    values = {form: _least(row, engines) for form, row in found.items()}
    form = max(values, key=lambda form: values[form] or 0.0)
    fastest = _least(found[form], list(found[form]["ratios"]))
    more = {"form": form} if len(forms) > 1 else {}
    return _goal(name, values[form], wanted[density], why, against_fastest=fastest, **more)


def _least(row: Row, engines: Sequence[str]) -> float | None:
    """The ratio to the fastest of these engines, as far as they were measured."""
    ratios = [row["ratios"][engine]["median"] for engine in engines if engine in row["ratios"]]
    return min(ratios, default=None)


def _find_ours(
    rows: Sequence[Row], stage: str, variant: str, pattern: str, dtype: str, density: float
) -> Row | None:
    wanted = {"who": "ours", "stage": stage, "variant": variant, "pattern": pattern, "dtype": dtype}
    wanted |= {"density": density, "batch": BATCH, "canvas": CANVAS, "start": "uniform", "prompt_in": "both"}
    matching = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return next((row for row in matching if row["ratios"]), None)


def _layer_goal(rows: Sequence[Row], phase: str, density: float) -> Row:
    """The geometric mean over ResNet-18's distinct 3x3 layers."""
    wanted = {"stage": "tune", "pattern": "unstructured", "dtype": "float32", "density": density}
    wanted |= {"kernel_size": [3, 3], "batch": BATCH}
    ratios = [
        row["ratios"]["float32"][phase]["median"]
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    ]
    name = f"{_NAMES[phase]}: unstructured float32 at density {density:g} against oneDNN float32, 3x3 layers"
    value = geometric_mean(ratios) if ratios else None
    why = None if ratios else "no layer was measured in this form"
    return _goal(
        name, value, LAYERS[phase][density], why, least=min(ratios, default=None), layers=len(ratios)
    )


def _sparseprop_goal(rows: Sequence[Row]) -> Row:
    """Both gradients, the geometric mean over 3x3 layers and densities."""
    name = "training kernels, unstructured float32, against SparseProp"
    mine = [row for row in rows if row["kernel_size"] == [3, 3] and row["batch"] == BATCH]
    ratios = [row["sparseprop"]["backward"]["median"] for row in mine if row.get("sparseprop")]
    if not ratios:
        return _goal(name, None, SPARSEPROP, "SparseProp is not installed")
    return _goal(name, geometric_mean(ratios), SPARSEPROP, least=min(ratios), rows=len(ratios))


def _prompt_goals(rows: Sequence[Row]) -> list[Row]:
    found = []
    for variant in ("framed", "released"):
        row = next((r for r in rows if _is_prompt_row(r, variant)), None)
        for phase, wanted in PROMPT.items():
            name = f"prompt_conv2d {variant}, {_NAMES[phase]} against torch's best dtype"
            found.append(_prompt_goal(name, row, phase, wanted))
        for phase in PROMPT:
            name = f"prompt_conv2d {variant}, {_NAMES[phase]}: extra memory over a float canvas of the batch"
            found.append(_memory_goal(name, row, phase))
    return found


def _is_prompt_row(row: Row, variant: str) -> bool:
    is_op = row["op"] == "prompt_conv2d" and row["variant"] == variant
    return is_op and (row["batch"], row["canvas"]) == (BATCH, CANVAS)


def _prompt_goal(name: str, row: Row | None, phase: str, wanted: float) -> Row:
    """Our best dtype against torch's best."""
    if row is None:
        return _goal(name, None, wanted, "the op was not measured at this size")
    by_form = {
        form: min(ratio[phase]["median"] for ratio in row["ratios"][form].values()) for form in row["ratios"]
    }
    form = max(by_form, key=lambda name: by_form[name])
    return _goal(name, by_form[form], wanted, form=form)


def _memory_goal(name: str, row: Row | None, phase: str) -> Row:
    if row is None:
        return _most(name, None, MOST_CANVAS, "the op was not measured at this size")
    extra = [found[phase] for found in row["extra_mb"].values() if found is not None]
    if not extra:
        return _most(name, None, MOST_CANVAS, "/proc/self/clear_refs cannot be written here")
    return _most(name, max(extra) / row["canvas_mb"], MOST_CANVAS)


def _selection_goal(rows: Sequence[Row]) -> Row:
    row = next((r for r in rows if r["op"] == "select_threshold" and r["scores"] == SCORES), None)
    name = f"select_threshold over {SCORES:,} scores, ms"
    if row is None:
        return _most(name, None, SELECT_MS, "the op was not measured at this size")
    value = row["arms"]["select_threshold"]["total"]["median_ms"]
    return _most(name, value, SELECT_MS, case=row["case"])


def _embedded_goal(rows: Sequence[Row]) -> Row:
    """Our best form against the faster reference."""
    by_form = {
        row["form"]: min(ratio["median"] for ratio in row["ratios"].values())
        for row in rows
        if row.get("ratios")
    }
    name = "pruning runs per hour, letters to digits, over the same with torch's dense layers"
    if not by_form:
        return _goal(name, None, RUNS_PER_HOUR, "no run was measured")
    form = max(by_form, key=lambda name: by_form[name])
    return _goal(name, by_form[form], RUNS_PER_HOUR, form=form)


def _large_goal(rows: Sequence[Row]) -> Row:
    """Search and tuning at 224 px, from their iterations, in the shares of the default epochs."""
    name = (
        f"pruning runs per hour at {CANVAS} px, from iterations, over the published scheme's fastest engine"
    )
    ours_ms = theirs_ms = 0.0
    for stage, epochs in _EPOCHS.items():
        mine = _find_ours(rows, stage, "framed", *_BLOCKS, 0.1)
        if mine is None:
            return _goal(name, None, RUNS_PER_HOUR, f"no row of {stage} framed in {' '.join(_BLOCKS)}")
        ms = mine["iteration"]["median_ms"]
        ours_ms += epochs * ms
        theirs_ms += epochs * ms * min(ratio["median"] for ratio in mine["ratios"].values())
    return _goal(name, theirs_ms / ours_ms, RUNS_PER_HOUR)


def _at_once_goal(rows: Sequence[Row]) -> Row:
    row = next((r for r in rows if r["form"] == "two at once"), None)
    name = "two runs at once over two in sequence, throughput"
    if row is None:
        return _goal(name, None, AT_ONCE, "no run was measured")
    return _goal(name, row["throughput"]["median"], AT_ONCE, threads_each=row["threads_each"])
