"""Do the goals of training say what the rows of a report say?"""

from __future__ import annotations

from typing import Any

import pytest

from bench.train_layers import PASSES
from bench.train_targets import targets
from tests.bench.training_rows import find, make_ratio, make_step


def test_step_goals_take_the_fastest_engine_that_counts_and_name_what_is_missing() -> None:
    both = {"torch_float32": 4.0, "torch__compile_float32": 3.0, "torch_bfloat16": 2.0}
    failed = {"who": "torch.compile", "arm": "torch.compile bfloat16", "why_not": "stopped", "ratios": {}}
    rows = [
        make_step("tune", "unstructured float32", 0.2, 100.0, **both),
        make_step("tune", "unstructured float32", 0.1, 100.0, **both),
        make_step("tune", "block:32x32 bfloat16", 0.1, 100.0, torch_bfloat16=5.0),
        make_step("search", "block:32x32 bfloat16", 0.1, 400.0, torch_bfloat16=2.0),
        # Not judged: another batch, start, or prompt.
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"batch": 8},
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"start": "method"},
        make_step("tune", "unstructured float32", 0.05, 1.0, **both) | {"prompt_in": "none"},
        make_step("tune", "block:32x32 bfloat16", 0.1, 100.0) | failed,
    ]
    found = targets({"steps": rows})
    first = find(found, "training step, fixed mask: unstructured float32 at density 0.2")
    assert (first["value"], first["wanted"], first["met"]) == (3.0, ">= 2.2", True)
    assert first["against_fastest"] == 2.0
    assert not find(found, "training step, fixed mask: unstructured float32 at density 0.1")["met"]
    absent = find(found, "training step, fixed mask: unstructured float32 at density 0.05")
    assert absent["value"] is None
    assert "no row of tune framed" in absent["why"]
    alone = find(found, "training step, fixed mask: block")
    assert (alone["value"], alone["met"], alone["why"]) == (5.0, False, "torch.compile bfloat16: stopped")
    # (60 · 2 · 400 + 30 · 5 · 100) / (60 · 400 + 30 · 100)
    assert find(found, "pruning runs per hour at 224 px")["value"] == pytest.approx(63 / 27)


def test_a_goal_that_leaves_our_dtype_free_takes_the_better_and_names_it() -> None:
    rows = [
        make_step("search", "unstructured float32", 0.1, 200.0, torch_float32=2.0) | {"variant": "released"},
        make_step("search", "unstructured bfloat16", 0.1, 100.0, torch_float32=2.6) | {"variant": "released"},
    ]
    name = "search iteration, two updates: unstructured float32 or bfloat16"
    goal = find(targets({"steps": rows}), name)
    assert (goal["value"], goal["met"], goal["form"]) == (2.6, True, "unstructured bfloat16")
    assert find(targets({"steps": rows[:1]}), name)["form"] == "unstructured float32"


def layer(**changes: Any) -> dict[str, Any]:
    ratios = {name: make_ratio(changes.pop("ratio", 1.0)) for name in PASSES[:1]}
    ratios |= {"input_gradient": make_ratio(4.0), "weight_gradient": make_ratio(9.0)}
    base = {"stage": "tune", "pattern": "unstructured", "dtype": "float32", "density": 0.2}
    return base | {"kernel_size": [3, 3], "batch": 32, "ratios": {"float32": ratios}} | changes


def test_layer_goals_are_geometric_means_over_3x3_layers() -> None:
    low = {"forward": make_ratio(1.0), "input_gradient": make_ratio(1.0), "weight_gradient": make_ratio(1.0)}
    rows = [layer(), layer(ratios={"float32": low})]
    rows += [layer(**one, ratios={"float32": low}) for one in ({"stage": "search"}, {"kernel_size": [1, 1]})]
    found = targets({"layers": rows})
    goal = find(found, "input gradient: unstructured float32 at density 0.2")
    assert (goal["value"], goal["least"], goal["layers"], goal["met"]) == (pytest.approx(2.0), 1.0, 2, False)
    kept = find(found, "kept-weight gradient: unstructured float32 at density 0.2")
    assert (kept["value"], kept["met"]) == (pytest.approx(3.0), True)
    assert find(found, "kept-weight gradient: unstructured float32 at density 0.1")["value"] is None


def test_both_gradients_count_against_sparseprop_where_it_is_installed() -> None:
    rows = [layer(sparseprop={"backward": make_ratio(value)}) for value in (2.0, 8.0)]
    rows += [layer(sparseprop=None), layer(sparseprop={"backward": make_ratio(1.0)}, kernel_size=[1, 1])]
    goal = find(targets({"layers": rows}), "training kernels, unstructured float32, against SparseProp")
    assert (goal["value"], goal["least"], goal["rows"], goal["met"]) == (pytest.approx(4.0), 2.0, 2, True)


def test_goals_of_ops_and_runs_are_read_off_their_rows() -> None:
    def versus(value: float) -> dict[str, Any]:
        return {"forward": make_ratio(value), "prompt_gradient": make_ratio(4 * value)}

    prompt = {"op": "prompt_conv2d", "variant": "framed", "batch": 32, "canvas": 224, "canvas_mb": 20.0}
    prompt["ratios"] = {
        "ours float32": {"torch float32": versus(5.0), "torch bfloat16": versus(2.0)},
        "ours bfloat16": {"torch float32": versus(6.0), "torch bfloat16": versus(3.0)},
    }
    prompt["extra_mb"] = {"float32": {"forward": 1.0, "prompt_gradient": 15.0}, "bfloat16": None}
    chosen = {"op": "select_threshold", "case": "all", "scores": 11_678_912}
    chosen["arms"] = {"select_threshold": {"total": {"median_ms": 7.0}}}
    runs = [
        {"form": "a", "ratios": {"reference": make_ratio(3.5), "other": make_ratio(3.2)}},
        {"form": "b", "ratios": {"reference": make_ratio(9.0), "other": make_ratio(1.0)}},
        {"form": "reference", "ratios": {}},
        {"form": "two at once", "threads_each": 1, "throughput": make_ratio(0.9)},
    ]
    found = targets({"ops": [prompt, chosen], "runs": runs})
    forward = find(found, "prompt_conv2d framed, forward against")
    assert (forward["value"], forward["form"], forward["met"]) == (3.0, "ours bfloat16", True)
    assert find(found, "prompt_conv2d framed, prompt gradient against")["value"] == 12.0
    memory = [find(found, f"prompt_conv2d framed, {what}: extra") for what in ("forward", "prompt gradient")]
    assert [(row["value"], row["met"]) for row in memory] == [(0.05, True), (0.75, False)]
    assert find(found, "prompt_conv2d released, forward against")["value"] is None
    assert find(found, "select_threshold")["met"]
    embedded = find(found, "pruning runs per hour, letters")
    assert (embedded["value"], embedded["form"], embedded["met"]) == (3.2, "a", True)
    assert not find(found, "two runs at once")["met"]
    assert find(found, "training kernels, unstructured float32, against SparseProp")["why"]


def test_every_goal_has_its_row_and_says_why_it_has_no_value() -> None:
    rows = targets({})
    assert len({row["name"] for row in rows}) == len(rows) == 27
    assert all(row["value"] is None and row["why"] and not row["met"] for row in rows)
