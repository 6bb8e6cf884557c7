"""Does a grid give the runs that it describes, and does a typo in it give one clear message?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vpns.config import RunConfig
from vpns.sweep.grid import build_grid, read_grid


def test_a_grid_gives_every_combination_in_order_with_names_that_tell_them_apart() -> None:
    grid = build_grid({"grid": {"method": ["vpns", "omp"], "density": [0.1, 0.05], "seed": [7, 9]}})
    names = [run.name for run in grid.runs]
    assert names[:3] == ["vpns-density0.1-seed7", "vpns-density0.1-seed9", "vpns-density0.05-seed7"]
    assert len(set(names)) == len(grid.runs) == 8
    assert grid.runs[2].config == RunConfig(method="vpns", density=0.05, seed=7)
    assert grid.runs[2].choices == {"method": "vpns", "density": "0.05", "seed": "7"}
    assert grid.until == "report"


def test_settings_hold_for_all_runs_and_named_choices_for_theirs() -> None:
    content: dict[str, Any] = {
        "settings": {"search": {"epochs": 5}, "tune.lr": 0.5},
        "grid": {
            "data": {"few": {"train_count": 50}, "all": {"train_count": None}},
            "arm": {"vpns": {}, "plain": {"method": "hydra", "prompt": {"kind": "none"}}},
        },
        "until": "eval",
    }
    grid = build_grid(content)
    assert [run.name for run in grid.runs] == ["few-vpns", "few-plain", "all-vpns", "all-plain"]
    assert {(run.config.search.epochs, run.config.tune.lr) for run in grid.runs} == {(5, 0.5)}
    assert [run.config.data.train_count for run in grid.runs] == [50, 50, None, None]
    assert [run.config.prompt.kind for run in grid.runs] == ["pad", "none"] * 2


def test_data_and_models_may_be_plain_names() -> None:
    grid = build_grid({"grid": {"data": ["digits"], "model": ["resnet18", "mine:build"]}})
    assert [run.config.model.name for run in grid.runs] == ["resnet18", "mine:build"]
    assert [run.name for run in grid.runs] == ["digits-resnet18", "digits-mine_build"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "expected keys"),
        ({"settings": {}}, "grid among them"),
        ({"gird": {}, "grid": {}}, "gird"),
        ({"grid": {"densty": [0.1]}}, r"'densty' \(did you mean density\?\)"),
        ({"grid": {"arm": {"a": {"promt.kind": "none"}}}}, r"did you mean prompt.kind"),
        ({"grid": {"data": {"a": {"nam": "digits"}}}}, r"data\.nam"),
        ({"grid": {"seed": 7}}, "expected a list of values"),
        ({"grid": {"seed": []}}, "expected a list of values"),
        ({"grid": {"seed": "seven"}}, "expected a list of values"),
        ({"grid": {"seed": [7, 7]}}, "different values"),
        ({"grid": {"seed": ["many"]}}, r"run many: .*seed"),
        ({"grid": {"density": [0.1, 2]}}, r"run density2: .*density"),
        ({"grid": {"density": [0.1]}, "settings": {"search": {"epochs": "x"}}}, r"epochs"),
        ({"grid": {"density": [0.1]}, "settings": [3]}, "expected settings for settings"),
        ({"grid": {"search": {"a": 3}}}, r"expected settings for search\.a"),
        ({"grid": {"model": {"a b": {}, "a_b": {}}}}, "different names"),
        ({"grid": {}, "until": "tune"}, "until"),
    ],
)
def test_what_is_no_grid_is_named(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(repr(content))
    with pytest.raises(ValueError, match=words) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("grid: [1\n  : {")
    with pytest.raises(ValueError, match=r"expected YAML in .*grid\.yaml"):
        read_grid(path)
