"""Does the bench of prompts time what it says, and leave the gradients that search needs?"""

from __future__ import annotations

import pytest

from bench.bench_prompts import PROMPTS, bench, make_pass, table
from vpns.prompt import PROMPTS as KINDS
from vpns.prompt import build_prompt


def test_every_kind_of_prompt_is_measured() -> None:
    assert {config.kind for config in PROMPTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_pass_leaves_gradients_of_prompt_and_scores(name: str) -> None:
    run, facts = make_pass(PROMPTS[name], batch=1)
    run()
    run()
    prompt = build_prompt(PROMPTS[name])
    assert (facts["entries"], facts["image_size"]) == (prompt.learned, prompt.image_size)
    cells = run.__closure__ or ()
    (predictor,) = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "network")]
    learns = {key: value.grad is not None for key, value in predictor.named_parameters()}
    assert learns["network.0.scores"]
    assert not learns["network.0.weight"]
    assert name == "none" or learns["prompt.raw"]


@pytest.mark.long
def test_rows_hold_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: PROMPTS[name] for name in ("none", "fix")}
    monkeypatch.setattr("bench.bench_prompts.PROMPTS", only)
    rows = bench(batch=1, rounds=1)
    assert [row["prompt"] for row in rows] == ["none", "fix"]
    assert all(row["median_ms"] > 0 and row["added_mb"] > 0 for row in rows)
    assert [row["fused"] for row in rows] == [True, False]
    assert len(table(rows).splitlines()) == 4
