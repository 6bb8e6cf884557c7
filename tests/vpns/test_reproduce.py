"""Are the experiments the ones that were planned, and do they find what is planted in them?"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from vpns import cli
from vpns.config import RunConfig, flatten
from vpns.files import read_json, write_json
from vpns.methods import Start, find_method
from vpns.models import build_model
from vpns.reproduce import EXPERIMENTS, make_grid
from vpns.reproduce.arms import FROZEN, FULL, INSIDE, LEARNED
from vpns.reproduce.command import judge, tell_test
from vpns.reproduce.frames import count_parameters
from vpns.sweep import Grid
from vpns_kernels.patterns import Channel, parse_pattern

TINY = """
data: {train_count: 60}
model: {name: "tiny_task:build", source_classes: 12}
prompt: {canvas: 16, frame: 2}
pretrain: {epochs: 0}
search: {epochs: 1, batch_size: 20, lr: 1e-2}
tune: {epochs: 1, batch_size: 20}
density: 0.3
pattern: unstructured
"""


def embedded_grid(name: str, seeds: int | None = None) -> Grid:
    return make_grid(EXPERIMENTS[name], dict(EXPERIMENTS[name].embedded), seeds)


def plant(grid: Grid, folder: Path, gain: dict[str, float]) -> None:
    """Runs of a grid as if they had been done, whose arms are better than their seeds by some points."""
    runs, draw = {}, random.Random(1)
    seeds = {str(seed): draw.gauss(90, 1.0) for seed in range(1, 100)}
    for run in grid.runs:
        accuracy = seeds[run.choices["seed"]] + gain.get(run.choices.get("arm", ""), 0.0) + draw.gauss(0, 0.7)
        found = {
            "eval": {"accuracy": accuracy, "dense_accuracy": 91.0},
            "search": {"weight_density": 0.1},
            "tune": {"updates": 1, "seconds": 1.0},
        }
        at = folder / "runs" / run.name
        for stage, result in found.items():
            (at / stage).mkdir(parents=True)
            (at / stage / "stage.json").write_text(json.dumps({"result": result}))
        (at / "run.json").write_text(json.dumps({"config": run.config.to_dict()}))
        runs[run.name] = {"choices": run.choices, "settings": run.config.to_dict()}
    write_json(folder / "sweep.json", {"schema_version": 1, "runs": runs})


def test_the_four_arms_differ_in_nothing_but_the_prompt_and_cost_the_same() -> None:
    runs = {run.choices["arm"]: run.config for run in embedded_grid("arms", 2).runs if run.config.seed == 1}
    assert set(runs) == {FULL, FROZEN, LEARNED, INSIDE}
    learned = runs[LEARNED]
    assert (learned.prompt.canvas, learned.prompt.frame, learned.method) == (32, 4, "vpns")
    assert runs[FROZEN].prompt.frozen
    assert runs[FULL].method == "hydra"
    assert runs[FULL].prompt.canvas == 32
    inside = runs[INSIDE]
    assert inside.prompt.canvas == 24
    operations = [config.density * config.prompt.canvas**2 for config in (learned, inside)]
    assert operations[0] == pytest.approx(operations[1], rel=1e-3)
    assert {(config.search, config.tune, config.data, config.model) for config in runs.values()} == {
        (learned.search, learned.tune, learned.data, learned.model)
    }


def test_a_planted_point_is_found_in_the_arms_and_a_planted_zero_is_not(tmp_path: Path) -> None:
    grid = embedded_grid("arms", 24)
    plant(grid, tmp_path, {LEARNED: 1.0, FROZEN: 1.0})
    found = judge(EXPERIMENTS["arms"], tmp_path)
    tests = {(test["first"], test["second"]): test for test in found["tests"]}
    primary = tests[FULL, LEARNED]
    assert primary["is_primary"]
    assert primary["pairs"] == 24
    assert primary["low"] > 0
    assert primary["p_value"] < 0.01
    (target,) = found["targets"]
    assert target["value"] == primary["detectable"]
    assert target["met"] is (primary["detectable"] <= 0.5)
    nothing = tests[FROZEN, LEARNED]
    assert not nothing["is_primary"]
    assert nothing["low"] < 0 < nothing["high"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "a gain is shown" in text
    assert tell_test(primary).startswith(f"{LEARNED} against {FULL}: +")
    assert len(found["runs"]) == len(grid.runs) == 96


def test_hydra_has_both_budgets_at_every_density() -> None:
    runs = embedded_grid("exp1").runs
    assert {run.config.seed for run in runs} == {1, 2, 3}
    once, twice = (
        next(run.config for run in runs if run.choices["method"] == name) for name in ("hydra", "hydra_twice")
    )
    assert (once.method, twice.method) == ("hydra", "hydra")
    assert (twice.search.epochs, twice.tune.epochs) == (2 * once.search.epochs, 2 * once.tune.epochs)
    densities = {run.config.density for run in runs if run.choices["method"] == "vpns"}
    assert {0.6, 0.4, 0.1} <= densities


def test_frames_are_the_papers_on_the_runs_canvas() -> None:
    runs = embedded_grid("exp2").runs
    frames = list(dict.fromkeys(run.config.prompt.frame for run in runs))
    assert frames == [2, 5, 7, 9]
    # The paper's own figures.
    at_224 = [RunConfig(prompt=type(runs[0].config.prompt)(canvas=224, frame=f)).prompt for f in (16, 64)]
    assert [count_parameters(prompt) for prompt in at_224] == [39_936, 122_880]


@pytest.mark.parametrize(
    "name",
    [pytest.param("arms", marks=pytest.mark.long), pytest.param("exp1", marks=pytest.mark.long), "exp2"],
)
def test_an_experiment_runs_on_a_users_own_settings_from_one_command(
    name: str,
    tmp_path: Path,
    tiny_task: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "exp1":
        monkeypatch.setattr("vpns.reproduce.hydra.DENSITIES", (0.3,))
    Path("mine.yaml").write_text(TINY + "seed: 3\n")
    options = ["--config=mine.yaml", "--seeds=2", "--workers=2", "--threads=1", "--json=out/x.json"]
    assert cli.main(["reproduce", name, *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    content = read_json(Path("out/x.json"))
    assert content == read_json(Path("runs", name, f"{name}.json"))
    assert len(printed) == len(content["tests"]) + 1
    assert {row["seed"] for row in content["runs"]} == {1, 2}
    assert content["machine"]["commit"]
    assert Path(printed[-1]).is_file()
    if name == "exp2":
        assert [row["frame"] for row in content["table"]] == [1, 2, 3, 5]
        assert all(row["ms_per_update"] > 0 and row["peak_mib"] > 0 for row in content["table"])


def test_an_experiment_without_settings_pretrains_one_network_for_all_its_runs(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = dict(flatten(yaml.safe_load(TINY)))
    monkeypatch.setitem(EXPERIMENTS, "exp2", replace(EXPERIMENTS["exp2"], embedded=tiny))
    options = ["--seeds=2", "--workers=2", "--threads=1", "--json=x.json"]
    assert cli.main(["reproduce", "exp2", *options]) == 0
    pretrained = Path("runs", "exp2", "pretrained")
    for run in Path("runs", "exp2", "runs").iterdir():
        assert read_json(run / "run.json")["config"]["model"]["weights"] == str(pretrained.resolve())
    first = read_json(Path("x.json"))
    assert cli.main(["reproduce", "exp2", *options]) == 0
    assert read_json(Path("x.json")) == first


def test_channels_are_compared_by_operations_and_time(tmp_path: Path, tiny_task: ModuleType) -> None:
    from vpns.report.several import read_sweep
    from vpns.reproduce.channels import EXP3, count_operations
    from vpns.sweep import run_sweep
    from vpns.sweep_options import SweepOptions

    settings: dict[str, Any] = {
        "data.train_count": 60,
        "model": {"name": "tiny_task:build", "source_classes": 12},
        "prompt": {"canvas": 16, "frame": 2},
        "pretrain.epochs": 0,
        "search": {"epochs": 1, "batch_size": 20},
        "tune": {"epochs": 1, "batch_size": 20},
        "pattern": "channel",
    }
    grid = make_grid(EXP3, settings, 2)
    assert {run.config.method for run in grid.runs} == {"vpns", "l1", "depgraph"}
    assert {run.config.density for run in grid.runs} == {0.9, 0.8, 0.7, 0.6, 0.5}
    assert grid.until == "report"
    few = Grid(
        tuple(run for run in grid.runs if run.name in ("l1-density0.5-seed1", "vpns-density0.5-seed1")),
        "eval",
    )
    run_sweep(few, SweepOptions(Path("x"), tmp_path / "s", workers=2, threads=1))
    runs = read_sweep(tmp_path / "s")
    rows = EXP3.tabulate(runs) if EXP3.tabulate is not None else []
    assert [row["arm"] for row in rows] == ["vpns, density 0.5", "l1, density 0.5"]
    dense, sparse = count_operations(runs[0])
    # conv1 8x8 of 3x3x3 to 8, conv2 of 8 to 8, the head.
    assert dense == 64 * 8 * 27 + 64 * 8 * 72 + 8 * 12
    assert sparse < 0.6 * dense
    assert EXP3.tell is not None
    assert EXP3.tell(rows).title == "Operations and time"


def start(pattern: str) -> Start:
    network = build_model(RunConfig().model, 52, seed=0)
    return Start(network, network, parse_pattern(pattern), seed=0)


def test_l1_keeps_the_filters_of_largest_norm_and_takes_channels_alone() -> None:
    begun = start("channel")
    method = find_method("l1")
    scores = method.start_scores(begun)
    weight = begun.pretrained.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, nn.Parameter)
    norms = weight.detach().abs().sum((1, 2, 3))
    assert any(
        torch.equal(ranks.argsort(), norms.argsort()) for ranks in scores.values() if len(ranks) == len(norms)
    )
    assert isinstance(begun.pattern, Channel)
    with pytest.raises(ValueError, match="method l1: expected pattern channel"):
        method.start_scores(start("unstructured"))


def test_depgraph_scores_every_stream_by_torch_pruning() -> None:
    torch_pruning = pytest.importorskip("torch_pruning", reason="needs torch-pruning (extra peers)")
    begun = start("channel")
    method = find_method("depgraph")
    scores = method.start_scores(begun)
    assert scores.keys() == find_method("l1").start_scores(begun).keys()
    assert all(bool((ranks > 0).all()) and len(ranks.unique()) == len(ranks) for ranks in scores.values())
    assert begun.fine_tuned is not None
    graph = torch_pruning.DependencyGraph().build_dependency(begun.fine_tuned, torch.zeros(1, 3, 64, 64))
    layer = begun.fine_tuned.get_submodule("layer1.0.conv1")
    group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=list(range(64)))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)(group)
    found = [ranks.argsort() for ranks in scores.values() if len(ranks) == 64]
    assert any(torch.equal(order, importance.argsort()) for order in found)
    with pytest.raises(ValueError, match="method depgraph: expected pattern channel"):
        method.start_scores(start("block:16x16"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exp4"], "expected one of"),
        (["arms", "--seeds", "1"], "seeds >= 2"),
        (["arms", "--config", "none.yaml"], "expected a YAML file"),
        (["arms", "--config", "typo.yaml"], "expected settings of a run in typo.yaml, got densty"),
    ],
)
def test_what_cannot_be_reproduced_is_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("densty: 0.1\n")
    assert cli.main(["reproduce", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()
