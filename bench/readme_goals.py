"""The table of goals: what was wanted, what was measured, and why it is less where it is.

A goal that is missed without a cause written down here stops the rendering.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.readme_source import link, where

SOURCES = ("ops", "train", "runs", "networks", "arms")
# Of every whole network: told where they are missed.
_USUAL = ("FLOPs that ran sparse", "largest error", "never slower")
# By words of a goal's name; the first that fit.
CAUSES = {
    "FLOPs that ran sparse": (
        "MobileNetV2's first convolution, depthwise layers and one of 16 channels run dense"
    ),
    "largest error": (
        "bfloat16 through deep networks of random weights: torch's own is off by 0.11 to 0.13 on the first "
        "two of MobileNetV2 and of ResNeXt-50"
    ),
    "unstructured at density": (
        "products of single weights run at two thirds of the cores' rate (each a broadcast, an offset "
        "and loads; sums pass through memory between chunks of channels), which dense float32 uses "
        "whole here; laying out and storing take a fifth of the layer"
    ),
    "input gradient: unstructured": (
        "as unstructured layers in float32; a stride makes it four convolutions"
    ),
    "kept-weight gradient: unstructured": (
        "as unstructured layers in float32, and sixteen lanes of each sum are added up"
    ),
    "training step, fixed mask: unstructured": "the convolutions' shares, and batch norms at memory's rate",
    "channel over the ratio of FLOPs": (
        "activations are read and written whole whatever is kept, kept channels fill vectors of "
        "sixteen in part, and dense convolutions leave little of the cores' rate unused here"
    ),
    "over the ratio of FLOPs": (
        "first convolution and activations shrink less than the multiply-adds; few channels fill "
        "vectors in part"
    ),
    "each layer: share of the lower": (
        "layers of some microseconds cost their call; single weights as said above"
    ),
    "where dense is chosen": "some microseconds of Python around torch's call, which small layers show",
    "where sparse is chosen": (
        "two of ResNet-50's first 1x1 layers, of 983 that were chosen sparse: they are bound by memory, and "
        "the costs that choose take them for a third faster than they are"
    ),
    "search iteration, two updates": (
        "scores take a dense weight gradient, at four fifths of the cores' rate: two thirds of the "
        "convolutions"
    ),
    "prompt_conv2d framed, forward": "the products alone take two thirds of it at the cores' whole rate",
    "prompt_conv2d released, forward": (
        "the products alone take 70 % of it at the cores' whole rate: behind the clamp no output is constant"
    ),
    "prompt_conv2d released, prompt gradient": (
        "behind the clamp each image has a gradient of its own; seven taps of three colours fill two "
        "thirds of two vectors"
    ),
    "prompt_conv2d framed, prompt gradient": "the gradient's sum over the batch, in float32",
    "pruning runs per hour, letters to digits": (
        "at 32 px packing anew and scores' gradients take a third of an update, and validating and starting "
        "up three tenths of a run"
    ),
    "pruning runs per hour at 224 px": (
        "scores take a dense weight gradient on both sides, here at four fifths of the cores' rate"
    ),
    "never slower than the best dense": (
        "so dense, most layers run dense in bfloat16: our kernels are as fast as the best engine's, "
        "give or take"
    ),
    "select_threshold": "one read of the scores takes longer on this machine",
}


def render_goals(folder: Path) -> str:
    """A table for each results file that has goals; one that no file measured is told once."""
    paths = [path for name in SOURCES for path in sorted(folder.glob(f"{name}-*.json"))]
    reports = {path: json.loads(path.read_text()) for path in paths}
    told: set[str] = {
        row["name"] for report in reports.values() for row in report["targets"] if row["value"] is not None
    }
    tables = []
    for path, report in reports.items():
        rows = [row for row in report["targets"] if row["value"] is not None or row["name"] not in told]
        told |= {row["name"] for row in rows}
        tables.append(_table(path, report.get("fingerprint") or report["machine"], rows))
    return "\n\n".join(tables)


def _table(path: Path, machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    head = f"{sum(row['met'] for row in rows)} of {len(rows)} met ({where(machine)}; {link(path)})"
    shown = [row for row in rows if not row["met"] or not any(usual in row["name"] for usual in _USUAL)]
    if not shown:
        return f"{head}."
    lines = [f"{head}:", "", "| goal | wanted | measured | why it is missed |", "|---|---|---|---|"]
    for row in shown:
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        # What was not measured says itself why.
        cause = "" if row["met"] else row["why"] if row.get("why") else find_cause(row["name"])
        lines.append(f"| {row['name']} | {row['wanted']} | {value} | {cause} |")
    return "\n".join(lines)


def find_cause(name: str) -> str:
    """The cause that is written down for a goal that was missed.

    Raises:
        ValueError: none is written down.
    """
    cause = next((cause for words, cause in CAUSES.items() if words in name), None)
    if cause is None:
        raise ValueError(
            f"find_cause: expected a cause in {__name__}.CAUSES of what was missed, got none for {name!r}"
        )
    return cause
