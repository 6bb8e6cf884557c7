"""Which goals on a GPU are met? Rows of {name, value, wanted, met, why} from the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]

# At what is measured: block pattern of layers and networks, and their batches.
PATTERN, BATCH, STEP_BATCH = "block:64x64", 128, 256
LEAST_CHANNELS = 128
LAYERS: Mapping[str, Mapping[float, float]] = {
    "forward": {0.2: 2.2, 0.1: 3.3, 0.05: 4.5},
    "input_gradient": {0.2: 2.2, 0.1: 3.3, 0.05: 4.5},
    "weight_gradient": {0.2: 2.0, 0.1: 3.0, 0.05: 4.0},
}
# Of the copy bandwidth; or the ratio above.
LEAST_COPY_FRAC, LEAST_PROMPT_FRAC = 0.8, 0.7
NETWORKS: Mapping[str, Mapping[float, float]] = {
    "resnet50": {0.2: 1.8, 0.1: 2.2, 0.05: 2.4},
    "resnet18": {0.2: 2.3, 0.1: 2.9, 0.05: 3.2},
    "vgg16_bn": {0.2: 2.5, 0.1: 3.2, 0.05: 3.5},
}
# By density of channels: half of them, and as many as leave a tenth of the weights.
CHANNELS = {0.5: 2.3, 0.316: 3.5}
STEPS = {"tune": 1.6, "search": 1.4}
PROMPT, SELECT_MS = 3.0, 0.1
CUDNN, AUTOTUNED = "torch bfloat16", "torch.compile max-autotune bfloat16"


def gpu_targets(parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """All goals, in the order of their table.

    Args:
        parts: rows of "layers", "networks", "steps" and "ops"; parts that were not measured may be missing.
    """
    layers, networks, steps, ops = (
        list(parts.get(name, ())) for name in ("layers", "networks", "steps", "ops")
    )
    found = [_layer_goal(layers, phase, density) for phase in LAYERS for density in LAYERS[phase]]
    found.append(_pointwise_goal(layers))
    for model, wanted in NETWORKS.items():
        found += [
            _network_goal(networks, model, PATTERN, density, ratio) for density, ratio in wanted.items()
        ]
    found += [
        _network_goal(networks, "resnet50", "channel", density, CHANNELS[density]) for density in CHANNELS
    ]
    found += [_step_goal(steps, stage) for stage in STEPS]
    return [*found, *_prompt_goals(ops), _selection_goal(ops)]


def _goal(
    name: str, value: float | None, wanted: float, why: str | None = None, is_most: bool = False
) -> Row:
    is_met = value is not None and why is None and (value <= wanted if is_most else value >= wanted)
    sign = "<=" if is_most else ">="
    return {"name": name, "value": value, "wanted": f"{sign} {wanted:g}", "met": is_met, "why": why}


def _ratio(row: Row, engines: Sequence[str]) -> float | None:
    """To the fastest of these engines; None where one of them was not measured."""
    if any(engine not in row["ratios"] for engine in engines):
        return None
    least: float = min(row["ratios"][engine]["median"] for engine in engines)
    return least


def _mean_ratio(rows: Sequence[Row], engines: Sequence[str]) -> tuple[float | None, str | None]:
    """The geometric mean over rows that have all engines, and what was missing."""
    if not rows:
        return None, "not measured"
    ratios = [ratio for row in rows if (ratio := _ratio(row, engines)) is not None]
    if not ratios:
        return None, f"no row has {' and '.join(engines)}"
    left_out = len(rows) - len(ratios)
    return geometric_mean(ratios), f"{left_out} rows without {' and '.join(engines)}" if left_out else None


def _layer_goal(rows: Sequence[Row], phase: str, density: float) -> Row:
    mine = [
        row
        for row in rows
        if (row["stage"], row["pass"], row["pattern"], row["density"]) == ("tune", phase, PATTERN, density)
        and row["kernel_size"] == [3, 3]
        and row["in_channels"] >= LEAST_CHANNELS
    ]
    engines = (CUDNN, AUTOTUNED) if phase == "forward" else (CUDNN,)
    value, why = _mean_ratio(mine, engines)
    what = f"{phase.replace('_', ' ')} of {PATTERN} at density {density:g}, 3x3 layers"
    name = f"{what}, against {' and '.join(engines)}"
    return _goal(name, value, LAYERS[phase][density], why)


def _pointwise_goal(rows: Sequence[Row]) -> Row:
    """The least of the layers; one whose ratio is enough counts as if it had the whole bandwidth."""
    mine = [row for row in rows if row["kernel_size"] == [1, 1] and row["pattern"] == PATTERN]
    mine = [row for row in mine if row["stage"] == "tune"]
    shares = []
    for row in mine:
        ratio, wanted = _ratio(row, (CUDNN,)), LAYERS[row["pass"]].get(row["density"])
        is_enough = ratio is not None and wanted is not None and ratio >= wanted
        shares.append(1.0 if is_enough else row["copy_frac"])
    why = None if shares else "not measured"
    name = "1x1 layers: share of the copy bandwidth (1 where the ratio of 3x3 layers is met), least"
    return _goal(name, min(shares, default=None), LEAST_COPY_FRAC, why)


def _network_goal(rows: Sequence[Row], model: str, pattern: str, density: float, wanted: float) -> Row:
    mine = [
        row for row in rows if (row["model"], row["pattern"], row["density"]) == (model, pattern, density)
    ]
    value, why = _mean_ratio(mine, (AUTOTUNED,))
    return _goal(f"{model}, {pattern} at density {density:g}, against {AUTOTUNED}", value, wanted, why)


def _step_goal(rows: Sequence[Row], stage: str) -> Row:
    mine = [
        row
        for row in rows
        if (row["stage"], row["who"], row["density"]) == (stage, "ours", 0.1) and row["model"] == "resnet50"
    ]
    engines = ("torch bfloat16",)
    value, why = _mean_ratio([row for row in mine if row["iteration"] is not None], engines)
    name = f"{stage} iteration, resnet50, block at density 0.1, batch {STEP_BATCH}, against {engines[0]}"
    return _goal(name, value, STEPS[stage], why)


def _prompt_goals(rows: Sequence[Row]) -> list[Row]:
    mine = [row for row in rows if row["op"] == "prompt_conv2d"]
    value, why = _mean_ratio(mine, (CUDNN,))
    shares = [row["copy_frac"] for row in mine]
    what = "prompt_conv2d, forward and prompt gradient"
    return [
        _goal(f"{what}, against unfused torch", value, PROMPT, why),
        _goal(f"{what}: share of the copy bandwidth", min(shares, default=None), LEAST_PROMPT_FRAC, why),
    ]


def _selection_goal(rows: Sequence[Row]) -> Row:
    mine = [row for row in rows if row["op"] == "select_threshold"]
    value = min((row["ours"]["median_ms"] for row in mine), default=None)
    scores = max((row["scores"] for row in mine), default=0)
    why = None if mine else "not measured"
    return _goal(f"select_threshold, {scores:,} scores, ms", value, SELECT_MS, why, is_most=True)
