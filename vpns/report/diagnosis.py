"""What went wrong, why, and what to try? One finding for each way in which a run of this method fails."""

from __future__ import annotations

from typing import Any

from vpns.methods import find_method
from vpns.report.accuracy import judge_accuracy, judge_certainty, judge_prompt
from vpns.report.facts import Facts
from vpns.report.finding import Finding
from vpns.report.speed import count_engines, explain_time
from vpns_kernels.patterns import parse_pattern

# Of what a search could change of its mask, the share below which it has not searched.
_LEAST_CHANGED_FRAC = 0.01
# How far from its density a pattern of one budget per group may be, where its groups are ragged.
_RAGGED_DENSITY = 0.001
_NAMED_LAYERS = 3


def diagnose(facts: Facts) -> list[Finding]:
    """Look at every known failure of a run; always the same findings in the same order."""
    return [
        *(_judge_speed(network) for network in facts.bench["networks"]),
        judge_accuracy(facts),
        judge_prompt(facts),
        _judge_layers(facts),
        _judge_search(facts),
        _judge_density(facts),
        *judge_certainty(facts),
    ]


def _judge_speed(network: dict[str, Any]) -> Finding:
    name = f"speedup over dense, {network['image_size']} px"
    speedup, low = network["speedup"], network["speedup_low"]
    best, engines = network["best_dense"], count_engines(network)
    if speedup < 1:
        return Finding(name, speedup, 1.0, "failed", f"Slower than {best}. {explain_time(network)}")
    if low is not None and low < 1:
        cause = (
            f"Faster than {best} in the median, yet the 95% interval reaches {low:.2f}: time it again on a "
            "quiet machine."
        )
        return Finding(name, speedup, 1.0, "unclear", cause)
    return Finding(name, speedup, 1.0, "ok", f"Faster than {best}, the fastest of {engines}.")


def _judge_layers(facts: Facts) -> Finding:
    layers = facts.result("search")["layers"]
    empty = [row["layer"] for row in layers if row["kept"] == 0]
    name = "layers that the mask empties"
    if not empty:
        thinnest = min(layers, key=lambda row: row["weight_density"])
        cause = f"Every layer keeps weights; {thinnest['layer']} fewest, {thinnest['weight_density']:.2%}."
        return Finding(name, 0.0, 0.0, "ok", cause)
    shown = ", ".join(empty[:_NAMED_LAYERS]) + (", ..." if len(empty) > _NAMED_LAYERS else "")
    cause = (
        f"No signal passes {shown} but around it, by a shortcut. The one budget for all layers went "
        "elsewhere: raise density, take a finer pattern, or raise search.epochs or search.lr, so that "
        "scores can recover."
    )
    return Finding(name, float(len(empty)), 0.0, "failed", cause)


def _judge_search(facts: Facts) -> Finding:
    """Search that ends with the mask it began with has cost time and found nothing."""
    name = "share of mask entries that search changed"
    density = facts.unit_density
    # An entry that comes takes the place of one that goes.
    limit = _LEAST_CHANGED_FRAC * 2 * min(density, 1 - density)
    changed = facts.result("search").get("mask_changed_frac")
    if not find_method(facts.config.method).learns_scores:
        return Finding(name, None, None, "absent", f"Method {facts.config.method} keeps its first mask.")
    if changed is None:
        return Finding(name, None, limit, "absent", "The run did not record it.")
    if limit == 0:
        return Finding(name, changed, limit, "absent", "At density 1 there is nothing to search.")
    if changed < limit:
        cause = "The mask is still its start: raise search.lr or search.epochs, or lower density."
        return Finding(name, changed, limit, "failed", cause)
    return Finding(name, changed, limit, "ok", "The scores moved the mask away from its start.")


def _judge_density(facts: Facts) -> Finding:
    difference = facts.unit_density - facts.config.density
    is_exact = parse_pattern(facts.config.pattern).is_global
    limit = 1 / facts.units if is_exact else _RAGGED_DENSITY
    name = "kept share of units off the density asked for"
    if abs(difference) <= limit * (1 + 1e-9):
        cause = f"{facts.unit_density:.4%} of {facts.units:,} units are kept."
        return Finding(name, difference, limit, "ok", cause)
    kept = f"{facts.unit_density:.4%} of {facts.units:,} units are kept."
    if not is_exact:
        cause = f"{kept} Where the pattern does not divide a layer's width, its last groups keep more."
    elif facts.config.prompt.variant == "released":
        cause = f"{kept} The published rule drops all scores that tie with its threshold: take framed."
    else:
        cause = f"{kept} The mask does not hold its density, which is a defect: please report it."
    return Finding(name, difference, limit, "failed", cause)
