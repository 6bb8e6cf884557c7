"""Is the choice of a kernel a pure function of sizes and table, and does it say why?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from vpns_kernels import ConvGeometry, native
from vpns_kernels.choose import Machine, break_even_density, choose, this_machine
from vpns_kernels.cost import TERMS, LayerQuery, cost_table, estimate, features, nearest_class

CONV = ConvGeometry(64, 64, (3, 3), padding=(1, 1))
STRIDED = ConvGeometry(64, 128, (3, 3), (2, 2), (1, 1))
NAMES = ("block_avx512", "unstructured_avx512", "scalar")


def takes(query: LayerQuery) -> Sequence[tuple[str, str]]:
    """What a machine with these kernels refuses."""
    return [
        (name, "" if name == "scalar" or name.startswith(query.format) else f"it takes {name} weights")
        for name in NAMES
    ]


MACHINE = Machine("avx512", 2, takes)


def row(p90: float = 0.2, **coefficients: float) -> dict[str, Any]:
    return {"layers": {"any": coefficients}, "error": {"median": p90 / 2, "p90": p90}, "rows": 9}


# On one thread a million multiply-adds take dense 1 ms and sparse 2 ms, a megabyte of planes 0.1 ms.
TABLE: dict[str, Any] = {
    "schema_version": 1,
    "classes": {
        "avx512": {
            "machine": {"cpu": "made up"},
            "kernels": {
                "dense float32": row(multiply_adds=1.0, call=0.01),
                "dense bfloat16": row(multiply_adds=0.5, call=0.01),
                "unstructured_avx512": row(multiply_adds=2.0, planes=0.1, call=0.02),
                "block_avx512": row(multiply_adds=1.2, planes=0.1, call=0.02),
                "scalar": row(multiply_adds=100.0),
                "compact": row(multiply_adds=1.5),
            },
        }
    },
}


def query(density: float, values_sizes: tuple[int, ...] = (0,), **changes: Any) -> LayerQuery:
    return replace(LayerQuery(CONV, (4, 14, 14), values_sizes), **changes).at_density(density)


def test_features_count_what_their_names_say() -> None:
    found = features(LayerQuery(CONV, (16, 14, 14), (100,)), "unstructured_avx512")
    assert found["multiply_adds"] == pytest.approx(16 * 14 * 14 * 100 / 1e6)
    assert found["input"] == found["output"] == pytest.approx(16 * 14 * 14 * 64 * 4 / 1e6)
    assert found["planes"] == pytest.approx(16 * 64 * 16 * 16 * 4 / 1e6)
    assert found["weights"] == pytest.approx(100 * 8 / 1e6)
    assert found["call"] == 1
    # A strided filter reads four planes, one for each remainder, two of three taps wide.
    strided = features(LayerQuery(STRIDED, (1, 14, 14), (3, 16, 16), "bfloat16", "bfloat16"), "block_amx")
    assert strided["planes"] == pytest.approx(64 * 16 * 16 * 2 / 1e6)
    assert strided["multiply_adds"] == pytest.approx(49 * 3 * 16 * 16 / 1e6)
    dense = features(LayerQuery(STRIDED, (1, 14, 14), (3,)), "dense float32")
    assert dense["multiply_adds"] == pytest.approx(49 * 64 * 128 * 9 / 1e6)
    assert set(found) | set(dense) == set(TERMS)


def test_a_batch_that_does_not_fill_the_lanes_costs_whole_vectors() -> None:
    full = features(LayerQuery(CONV, (16, 7, 7), (100,)), "unstructured_avx512")["multiply_adds"]
    # Seven rows of seven pixels and two between: 61 lanes, four vectors.
    one = features(LayerQuery(CONV, (1, 7, 7), (100,)), "unstructured_avx512")["multiply_adds"]
    assert full == pytest.approx(16 * 49 * 100 / 1e6)
    assert one == pytest.approx(64 * 100 / 1e6)


@pytest.mark.parametrize("values_sizes", [(0,), (0, 16, 16), (0, 32, 16), (64, 64, 3, 3)])
def test_a_density_reads_back(values_sizes: tuple[int, ...]) -> None:
    for density in (0.02, 0.25, 1.0):
        found = query(density, values_sizes)
        assert found.density == pytest.approx(density, abs=0.01)
        assert found.format == query(0.5, values_sizes).format


def test_sparse_is_chosen_only_beyond_what_the_estimates_may_be_off() -> None:
    sparse = choose(query(0.05), MACHINE, TABLE)
    assert sparse.kernel == "unstructured_avx512"
    assert sparse.est_ms * 1.2 < sparse.dense_ms
    assert sparse.speedup == pytest.approx(sparse.dense_ms / sparse.est_ms)
    assert "unstructured_avx512" in sparse.reason
    assert "dense" in sparse.reason
    assert "bound by" in sparse.reason
    close = choose(query(0.42), MACHINE, TABLE)
    assert close.kernel == "dense"
    assert "less apart than estimates may be off (20%)" in close.reason
    full = choose(query(1.0), MACHINE, TABLE)
    assert full.kernel == "dense"
    assert full.reason.startswith("dense is faster here: unstructured_avx512")
    assert full.est_ms == full.dense_ms


def test_every_kernel_is_a_candidate_with_its_estimate_or_its_refusal() -> None:
    found = choose(query(0.1, (0, 16, 16)), MACHINE, TABLE)
    by_name = {c.kernel: c for c in found.candidates}
    assert list(by_name) == [*NAMES, "dense float32", "dense bfloat16"]
    assert by_name["unstructured_avx512"].ms is None
    assert by_name["unstructured_avx512"].reason == "it takes unstructured_avx512 weights"
    ms = by_name["block_avx512"].ms
    assert found.kernel == "block_avx512"
    assert ms == found.est_ms
    # bf16 may be faster, but rounds what a float32 layer would not.
    assert "not chosen for float32 inputs" in by_name["dense bfloat16"].reason
    assert "compact" in {c.kernel for c in choose(query(0.1, (8, 8, 3, 3)), MACHINE, TABLE).candidates}


def test_a_machine_without_any_kernel_runs_dense() -> None:
    nothing = Machine("avx512", 1, lambda query: [("native", "it was not built")])
    found = choose(query(0.01), nothing, TABLE)
    assert (found.kernel, found.reason) == ("dense", "dense: no sparse kernel takes this layer")


def test_the_cost_of_a_call_is_not_shared_by_threads() -> None:
    one, four = (estimate(query(0.1), "unstructured_avx512", "avx512", t, TABLE) for t in (1, 4))
    assert four.terms["call"] == one.terms["call"] == 0.02
    assert four.terms["multiply_adds"] == pytest.approx(one.terms["multiply_adds"] / 4)
    assert one.bound_by == "multiply-adds"
    assert estimate(query(0.0), "unstructured_avx512", "avx512", 1, TABLE).bound_by == "laying out the input"


def test_what_was_never_measured_is_carried_over_and_says_so() -> None:
    tiles = Machine("amx", 2, lambda query: [("block_amx", ""), *takes(query)])
    found = choose(query(0.5, (0, 16, 16), dtype="bfloat16", weight_dtype="bfloat16"), tiles, TABLE)
    assert "measured: false" in found.reason
    by_name = {c.kernel: c for c in found.candidates}
    measured = choose(query(0.5, (0, 16, 16)), MACHINE, TABLE)
    assert "measured: false" not in measured.reason
    # Tiles multiply faster than vectors; bytes cost what they did.
    block, amx = (by_name[name].estimate for name in ("block_avx512", "block_amx"))
    assert block is not None
    assert amx is not None
    assert not block.measured
    assert amx.terms["multiply_adds"] < block.terms["multiply_adds"] / 5
    assert amx.terms["call"] == block.terms["call"]
    # On a known machine a kernel that the table lacks is carried over too, and no estimate is trusted more.
    fp16 = Machine("avx512", 2, lambda query: [("unstructured_avx512_fp16", "")])
    (first, *_) = choose(query(0.1), fp16, TABLE).candidates
    assert first.estimate is not None
    assert not first.estimate.measured
    assert first.estimate.error >= 0.5


def test_estimates_carried_over_to_tiles_are_near_what_was_measured_there() -> None:
    # Milliseconds of two threads at batch 16: dense float32, dense bf16, blocks of 16 at density 0.1.
    measured = {
        (64, 56): (9.8, 1.44, 0.84),
        (128, 28): (9.4, 1.10, 0.63),
        (256, 14): (9.1, 1.28, 0.50),
        (512, 7): (10.3, 2.43, 0.52),
    }
    names = ("dense float32", "dense bfloat16", "block_amx")
    for (channels, side), times in measured.items():
        geometry = ConvGeometry(channels, channels, (3, 3), padding=(1, 1))
        sizes = ((16, side, side), (0, 16, 16), "bfloat16", "bfloat16")
        layer = LayerQuery(geometry, *sizes).at_density(0.1)
        for name, ms in zip(names, times, strict=True):
            cast = replace(layer, dtype="float32") if name == "dense float32" else layer
            assert 1 / 3 < estimate(cast, name, "amx", 2, cost_table()).ms / ms < 3, (name, channels)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_every_dtype_has_an_estimate(dtype: str) -> None:
    found = choose(query(0.1, dtype=dtype, weight_dtype=dtype), MACHINE, TABLE)
    assert found.dense_ms > 0
    assert {c.kernel for c in found.candidates} >= {f"dense {dtype}", "dense float32", "dense bfloat16"}


def test_cores_of_their_own_costs_use_them_and_any_others_say_that_theirs_were_not_measured() -> None:
    usual = TABLE["classes"]["avx512"]
    slow = {kernel: row(call=7.0) for kernel in usual["kernels"]}
    table = {**TABLE, "classes": {"avx512 amd26": {"kernels": slow}, "avx512 amd25": usual}}
    known, other = (replace(MACHINE, core=core) for core in ("amd25", "intel6.106"))
    assert choose(query(0.1), known, table).est_ms == choose(query(0.1), MACHINE, TABLE).est_ms
    assert choose(query(0.1), replace(MACHINE, core="amd26"), table).dense_ms == 7.0
    assert "measured: false" not in choose(query(0.1), known, table).reason
    assert "measured: false" in choose(query(0.1), other, table).reason
    (first, *_) = (c.estimate for c in choose(query(0.1), other, table).candidates if c.estimate)
    assert first.error >= 0.5


def test_the_nearest_class_is_a_weaker_one_where_there_is_any() -> None:
    assert nearest_class("avx512", ["avx512 amd26", "avx512 amd25"], "amd26") == "avx512 amd26"
    assert nearest_class("amx", ["avx512 amd26", "avx2 intel6.143"], "intel6.143") == "avx512 amd26"
    assert nearest_class("amx", ["avx512 amd25", "avx512 amd26"], "intel6.143") == "avx512 amd25"
    assert nearest_class("amx", ["avx2", "avx512"]) == "avx512"
    assert nearest_class("avx512", ["avx2", "amx"]) == "avx2"
    assert nearest_class("scalar", ["avx512", "amx"]) == "avx512"


def test_break_even_lies_where_the_choice_turns() -> None:
    at = break_even_density(query(0.1), MACHINE, TABLE)
    assert 0.2 < at < 0.5
    assert choose(query(at - 0.01), MACHINE, TABLE).kernel == "unstructured_avx512"
    assert choose(query(at + 0.01), MACHINE, TABLE).kernel == "dense"


@pytest.mark.parametrize(
    "changes", [{"values_sizes": (1, 2)}, {"values_sizes": (-1,)}, {"dtype": "int8"}, {"size": (1, 0, 0)}]
)
def test_a_query_that_means_nothing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(LayerQuery(CONV, (4, 14, 14), (9,)), **changes)


def test_the_shipped_table_says_where_it_was_measured_and_how_far_it_is_off() -> None:
    table = cost_table()
    assert table["classes"]
    for measured in table["classes"].values():
        assert {"cpu", "date", "commit", "threads"} <= set(measured["machine"])
        assert {"dense float32", "dense bfloat16"} <= set(measured["kernels"])
        for found in measured["kernels"].values():
            assert 0 <= found["error"]["median"] <= found["error"]["p90"]
            assert "any" in found["layers"]
            values = [v for of_class in found["layers"].values() for v in of_class.values()]
            assert min(values) >= 0
            assert all(set(of_class) <= set(TERMS) for of_class in found["layers"].values())
    json.dumps(table)


def test_the_choice_falls_with_density_and_does_not_change_by_itself() -> None:
    machine = this_machine()
    at = [query(density, size=(16, 28, 28)) for density in (0.02, 0.1, 0.5, 1.0)]
    times = [choose(q, machine).est_ms for q in at]
    assert times == sorted(times)
    assert [choose(q, machine) for q in at] == [choose(q, machine) for q in at]
    if native.why_not() is None and machine.isa != "scalar":
        assert choose(at[0], machine).kernel.startswith("unstructured")


def test_refusals_need_no_weights_and_are_those_of_the_kernels() -> None:
    refusals = dict(this_machine().refusals(query(0.1, (0, 16, 16))))
    assert refusals["scalar"] == ""
    usable = set(native.library().sparse_conv2d_kernels())
    for name, reason in refusals.items():
        if name.startswith("unstructured"):
            assert reason in ("it takes unstructured weights", f"it needs {name.partition('_')[2]}")
        assert name in usable or reason.startswith("it needs")
    grouped = LayerQuery(replace(CONV, groups=2), (1, 8, 8), (10,), "float64", "float64")
    assert [name for name, reason in this_machine().refusals(grouped) if not reason] == ["scalar"]
    assert this_machine().threads == torch.get_num_threads()
