"""Does the fit find what made the times, and does the tuner write a table that choose reads?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import tune
from bench.fit import fit_kernels, to_query
from vpns_kernels import ConvGeometry, native
from vpns_kernels.choose import Machine, choose
from vpns_kernels.cost import LayerQuery, estimate, features
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import measurement_lock

TRUE = {"multiply_adds": 0.02, "planes": 0.1, "output": 0.05, "call": 0.01}


def made_up_rows(kernel: str, slower: float = 1.0) -> list[dict[str, Any]]:
    """Times that follow the model exactly, of layers of several sizes."""
    rows = []
    for side in (7, 14, 28, 56):
        for channels in (32, 64, 128):
            for density in (0.05, 0.5):
                geometry = ConvGeometry(channels, 2 * channels, (3, 3), padding=(1, 1))
                query = LayerQuery(geometry, (16, side, side), (0,)).at_density(density)
                if kernel.startswith("dense"):
                    query = LayerQuery(geometry, (16, side, side), (0,))
                found = features(query, kernel)
                shared = sum(TRUE[name] * found[name] for name in TRUE if name != "call" and name in found)
                about = {"kernel": kernel, "cell": f"{channels} {side}", "layer": "a", "threads": 2}
                rows.append(asdict(query) | about | {"ms": slower * (shared / 2 + TRUE["call"])})
    return rows


def test_the_fit_finds_what_made_the_times() -> None:
    fits = fit_kernels(made_up_rows("unstructured_avx512") + made_up_rows("dense float32"))
    fit = fits["unstructured_avx512"]
    # Layers that differ in size only: the features besides are told apart, or share what they explain.
    assert fit["error"]["p90"] < 1e-3
    assert fit["error"]["margin"] < 1e-3
    assert fit["layers"]["any"]["multiply_adds"] == pytest.approx(0.02, rel=1e-2)
    assert fit["layers"]["any"]["call"] == pytest.approx(0.01, rel=0.2)
    assert "margin" not in fits["dense float32"]["error"]
    assert fit["rows"] == 24
    row = made_up_rows("unstructured_avx512")[5]
    table = {"schema_version": 1, "classes": {"avx512": {"kernels": fits}}}
    expected = estimate(to_query(row), "unstructured_avx512", "avx512", 2, table)
    assert expected.ms == pytest.approx(row["ms"], rel=1e-3)
    assert expected.measured


def test_of_a_row_that_was_measured_twice_the_least_time_counts() -> None:
    rows = made_up_rows("unstructured_avx512")
    disturbed = made_up_rows("unstructured_avx512", slower=3.0)
    assert fit_kernels(disturbed + rows) == fit_kernels(rows)


def test_the_design_holds_every_layer_that_is_not_too_much_once_per_batch() -> None:
    cells = tune.design()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.batch for cell in cells} == {1, 16, 32}
    assert {cell.layer.geometry.groups > 1 for cell in cells} == {True, False}
    for cell in cells:
        flops = cell.layer.geometry.flops(cell.batch, cell.layer.height, cell.layer.width)
        assert flops <= tune.MOST_GFLOP * 1e9


@pytest.mark.skipif(native.why_not() is not None, reason="needs the compiled library")
def test_a_tuned_table_is_one_that_choose_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(f"conv{c}", ConvGeometry(c, 16, (3, 3), padding=(1, 1)), 6, 6) for c in (8, 16)]
    cells = [tune.Cell(layer, 2, (0.5, 0.1)) for layer in layers]
    monkeypatch.setattr(tune, "design", lambda: cells)
    monkeypatch.setattr(tune, "CELL_SECONDS", 0.01)
    monkeypatch.setattr(tune, "MOST_TURNS", 1)
    monkeypatch.setattr(tune, "measurement_lock", lambda: measurement_lock(tmp_path / "lock"))
    options = ["--rows", str(tmp_path), "--table", str(tmp_path / "table.json"), "--passes", "1"]
    assert tune.main([*options, "--here"]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    before = path.read_text()
    # Nothing is left to measure.
    assert tune.main([*options, "--here"]) == 0
    assert path.read_text() == before
    assert tune.main([*options, "--fit"]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    kernels = table["classes"][path.stem]["kernels"]
    assert {"dense float32", "dense bfloat16"} < set(kernels)
    assert {"unstructured", "block", "channel"} <= {name.partition("_")[0] for name in kernels}
    query = LayerQuery(layers[0].geometry, (2, 6, 6), (50,))
    takes = [(name, "") for name in kernels if name.startswith("unstructured")]
    isa, core = path.stem.split()
    found = choose(query, Machine(isa, 1, lambda query: takes, core), table)
    assert "measured: false" not in found.reason
