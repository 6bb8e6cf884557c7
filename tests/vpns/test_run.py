"""Is a run done once, resumed where it stopped, refused where it cannot be, and honest about its images?"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vpns.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    TuneConfig,
)
from vpns.data import ImageSet, Split
from vpns.files import read_json, read_tensors
from vpns.metrics import MetricsLog
from vpns.observe import End, EpochMetrics, Observer, StageStart, Step
from vpns.run import execute, load_config, open_finished
from vpns.stages import load_pruned

FINAL = ("search/masks", "search/scores", "search/prompt", "tune/weights", "tune/prompt", "eval/outputs")


class Recorder(Observer):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, start: StageStart) -> None:
        self.seen.append(start)

    def on_step(self, step: Step) -> None:
        self.seen.append(step)

    def on_eval(self, metrics: EpochMetrics) -> None:
        self.seen.append(metrics)

    def on_end(self, end: End) -> None:
        self.seen.append(end)


class At(Observer):
    """Does something at one update of a stage."""

    def __init__(self, stage: str, update: int, act: Callable[[], None]) -> None:
        self.stage, self.left, self.act = stage, update, act

    def on_step(self, step: Step) -> None:
        if step.stage == self.stage:
            self.left -= 1
            if self.left == 0:
                self.act()


def final_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in FINAL
        for key, tensor in read_tensors(folder / f"{name}.safetensors").items()
    }


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = final_tensors(folder), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in MetricsLog(folder).rows()]


def test_a_run_is_done_once(tmp_path: Path, tiny_task: ModuleType) -> None:
    first, again = Recorder(), Recorder()
    execute(tmp_path, tiny_task.make_config(), "eval", [first])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "run.lock"}
    execute(tmp_path, tiny_task.make_config(), "eval", [again])
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.name != "run.lock"}
    assert again.seen == []
    ends = [seen.stage for seen in first.seen if isinstance(seen, End)]
    assert ends == ["pretrain", "dense", "search", "tune", "eval"]


def test_metrics_have_a_row_per_epoch_with_updates_images_and_seconds(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    execute(tmp_path, tiny_task.make_config(), "eval")
    rows = MetricsLog(tmp_path).rows()
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        (stage, epoch) for stage in ("dense", "search", "tune") for epoch in (1, 2, 3)
    ]
    assert [row["iteration"] for row in rows[:3]] == [row["updates"] for row in rows[:3]] == [3, 6, 9]
    assert [row["images_seen"] for row in rows[:3]] == [60, 120, 180]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 10


def test_what_is_pruned_is_zero_and_the_counts_are_exact(tmp_path: Path, tiny_task: ModuleType) -> None:
    execute(tmp_path, tiny_task.make_config(), "eval")
    masks = read_tensors(tmp_path / "tune" / "masks.safetensors")
    scores = read_tensors(tmp_path / "search" / "scores.safetensors")
    weights = read_tensors(tmp_path / "tune" / "weights.safetensors")
    result = open_finished(tmp_path).finished["search"].result
    total = sum(mask.numel() for mask in masks.values())
    assert result["kept"] == sum(int(mask.sum()) for mask in masks.values()) == int(0.3 * total + 0.5)
    assert {key for key in weights} == set(tiny_task.build(12).state_dict())
    for name, mask in masks.items():
        assert not weights[f"{name}.weight"][~mask].any()
        assert bool((scores[name].abs()[mask] >= result["threshold"]).all())
        assert bool((scores[name].abs()[~mask] <= result["threshold"]).all())


def test_the_best_checkpoint_is_the_earliest_of_the_best(tmp_path: Path, tiny_task: ModuleType) -> None:
    config = tiny_task.make_config(tune=TuneConfig(epochs=8, batch_size=20, lr=0.3))
    execute(tmp_path, config, "eval")
    accuracies = [row["accuracy"] for row in MetricsLog(tmp_path).rows() if row["stage"] == "tune"]
    record = open_finished(tmp_path).finished["tune"].result
    assert record["val_accuracy"] == max(accuracies)
    assert record["best_epoch"] == 1 + accuracies.index(max(accuracies))
    # And it is that one whose weights were kept.
    context = open_finished(tmp_path)
    pruned = load_pruned(context)
    from vpns.batches import iterate_split
    from vpns.predictor import Predictor
    from vpns.step import predict_logits

    val = context.images.val
    batches = iterate_split(val, pruned.prompt.image_size, pruned.is_prompted)
    logits = predict_logits(Predictor(pruned.prompt, pruned.network), pruned.label_map, batches)
    assert 100 * float((logits.argmax(1) == val.labels).double().mean()) == max(accuracies)


def test_outputs_of_every_test_image_are_kept_and_give_the_accuracies(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    execute(tmp_path, tiny_task.make_config(), "eval")
    outputs = read_tensors(tmp_path / "eval" / "outputs.safetensors")
    result = open_finished(tmp_path).finished["eval"].result
    assert {tuple(outputs[key].shape) for key in ("logits", "logits_prompted", "dense_logits")} == {
        (result["test_images"], 10)
    }
    for key, name in (
        ("logits", "sparse_accuracy"),
        ("logits_prompted", "sparse_accuracy_prompted"),
        ("dense_logits", "dense_accuracy"),
    ):
        right = outputs[key].argmax(1) == outputs["labels"]
        assert result[name] == pytest.approx(100 * float(right.double().mean()))
    assert result["accuracy"] == result["sparse_accuracy_prompted"]


def test_the_test_split_is_not_touched_before_eval(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageSet) -> Split:
        raise AssertionError("the test split was touched")

    monkeypatch.setattr(ImageSet, "test", property(refuse, lambda self, split: None), raising=False)
    execute(tmp_path, tiny_task.make_config(), "tune")
    with pytest.raises(AssertionError, match="touched"):
        execute(tmp_path, tiny_task.make_config(), "eval")


def test_another_configuration_in_the_same_folder_is_refused_by_name(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    execute(tmp_path, tiny_task.make_config(), "pretrain")
    other = tiny_task.make_config(density=0.5, search=SearchConfig(epochs=9))
    with pytest.raises(
        ValueError, match=r"got others for density, search\.epochs, search\.batch_size, search\.lr"
    ):
        execute(tmp_path, other, "pretrain")
    assert load_config(tmp_path) == tiny_task.make_config()
    execute(tmp_path, tiny_task.make_config(threads=2, save_every_s=5.0), "pretrain")


def test_a_resumed_run_takes_the_threads_it_began_with(tmp_path: Path, tiny_task: ModuleType) -> None:
    execute(tmp_path, tiny_task.make_config(threads=1), "pretrain")
    torch.set_num_threads(2)
    execute(tmp_path, tiny_task.make_config(threads=0), "pretrain")
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("stage", "update"), [("dense", 1), ("search", 5), ("tune", 9)])
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_weights(
    tmp_path: Path, tiny_task: ModuleType, stage: str, update: int
) -> None:
    config = tiny_task.make_config()
    # Python's own, or none at all where a shell began this in the background.
    handler = signal.getsignal(signal.SIGINT)
    execute(tmp_path / "whole", config, "eval")
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / "run", config, "eval", [At(stage, update, interrupt)])
    resumed = Recorder()
    execute(tmp_path / "run", config, "eval", [resumed])
    starts = [seen for seen in resumed.seen if isinstance(seen, StageStart)]
    assert starts[0] == StageStart(stage, 9, update)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is handler


def test_observers_that_draw_random_numbers_change_nothing(tmp_path: Path, tiny_task: ModuleType) -> None:
    class Gambler(Observer):
        def on_step(self, step: Step) -> None:
            torch.rand(step.iteration + 1)

    execute(tmp_path / "alone", tiny_task.make_config(), "eval")
    execute(tmp_path / "watched", tiny_task.make_config(), "eval", [Gambler()])
    assert_same(tmp_path / "alone", tmp_path / "watched")


def test_a_run_that_diverges_says_where_and_keeps_its_last_good_state(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    config = tiny_task.make_config(tune=TuneConfig(epochs=3, batch_size=20, lr=1e30), save_every_s=0.0)
    with pytest.raises(FloatingPointError, match=r"(dense|tune), iteration \d+: expected finite .*finite"):
        execute(tmp_path, config, "eval")
    for state in tmp_path.glob("*/state-*.safetensors"):
        for name, tensor in read_tensors(state).items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name
    with pytest.raises(FloatingPointError, match=r"(dense|tune), iteration \d+: expected finite .*finite"):
        execute(tmp_path, config, "eval")


def test_a_damaged_output_is_named_and_its_stage_can_be_done_again(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    config = tiny_task.make_config()
    execute(tmp_path / "run", config, "eval")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    path = tmp_path / "run" / "search" / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"of .*search/masks\.safetensors, got .*remove .*search to do"):
        execute(tmp_path / "run", config, "eval")
    shutil.rmtree(tmp_path / "run" / "search")
    again = Recorder()
    execute(tmp_path / "run", config, "eval", [again])
    # It came to the same outcome, so what was built on it still stands.
    assert [seen.stage for seen in again.seen if isinstance(seen, End)] == ["search"]
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert sorted(map(str, rows_of(tmp_path / "run"))) == sorted(map(str, rows_of(tmp_path / "whole")))


def test_a_stage_half_done_on_something_else_begins_anew(tmp_path: Path, tiny_task: ModuleType) -> None:
    config = tiny_task.make_config()
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / "run", config, "eval", [At("search", 5, interrupt)])
    execute(tmp_path / "other", tiny_task.make_config(seed=8), "pretrain")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    shutil.copytree(tmp_path / "other" / "pretrain", tmp_path / "run" / "pretrain")
    again = Recorder()
    execute(tmp_path / "run", config, "search", [again])
    starts = {seen.stage: seen for seen in again.seen if isinstance(seen, StageStart)}
    assert starts["search"] == StageStart("search", 9, 0)


def test_a_stage_that_was_built_on_something_else_is_done_again(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    execute(tmp_path / "run", tiny_task.make_config(), "eval")
    execute(tmp_path / "other", tiny_task.make_config(seed=8), "pretrain")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    shutil.copytree(tmp_path / "other" / "pretrain", tmp_path / "run" / "pretrain")
    again = Recorder()
    execute(tmp_path / "run", tiny_task.make_config(), "eval", [again])
    assert [seen.stage for seen in again.seen if isinstance(seen, End)] == ["dense", "search", "tune", "eval"]


@pytest.mark.parametrize("method", ["hydra", "omp", "random"])
def test_every_method_prunes_to_the_same_density_without_a_prompt(
    tmp_path: Path, tiny_task: ModuleType, method: str
) -> None:
    execute(tmp_path, tiny_task.make_config(method=method), "eval")
    finished = open_finished(tmp_path).finished
    assert finished["search"].result["weight_density"] == pytest.approx(0.3, abs=1e-3)
    assert finished["eval"].result["sparse_accuracy_prompted"] is None
    assert read_tensors(tmp_path / "tune" / "prompt.safetensors") == {}
    assert ("updates" in finished["search"].result) == (method == "hydra")


@pytest.mark.parametrize(
    ("pattern", "density"), [("block:4x4", 0.3), ("channel", 0.5), ("nm:2:4", 0.5), ("unstructured", 1.0)]
)
def test_every_pattern_runs_and_the_plain_network_is_the_masked_one(
    tmp_path: Path, tiny_task: ModuleType, pattern: str, density: float
) -> None:
    execute(tmp_path, tiny_task.make_config(pattern=pattern, density=density), "eval")
    finished = open_finished(tmp_path).finished
    outputs = read_tensors(tmp_path / "eval" / "outputs.safetensors")
    assert bool(outputs["logits_prompted"].isfinite().all())
    rows = finished["search"].result["layers"]
    weights = read_tensors(tmp_path / "tune" / "weights.safetensors")
    for row in rows:
        assert int((weights[f"{row['layer']}.weight"] != 0).sum()) <= row["kept"]


def test_the_weights_of_another_run_can_be_taken(tmp_path: Path, tiny_task: ModuleType) -> None:
    execute(tmp_path / "one", tiny_task.make_config(), "pretrain")
    model = ModelConfig("tiny_task:build", weights=str(tmp_path / "one"), source_classes=12)
    execute(tmp_path / "two", tiny_task.make_config(model=model, seed=99), "pretrain")
    one, two = (read_tensors(tmp_path / f / "pretrain" / "weights.safetensors") for f in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, r"expected method in \['depgraph', 'hydra', .*'vpns'\], got 'magic'"),
        ({"pattern": "blocks"}, "parse_pattern: expected one of"),
        ({"pattern": "nm:2:4", "density": 0.4}, r"density: expected 0\.5 for pattern nm:2:4, got 0\.4"),
        ({"device": "abacus"}, "expected a device that torch has, got 'abacus'"),
        (
            {"schedule": "mask_then_prompt", "method": "hydra"},
            "expected scores and a prompt that are learned",
        ),
        ({"data": DataConfig("folder", root="/nowhere")}, "expected an image folder, got /nowhere"),
        ({"model": ModelConfig("tiny_task:absent", source_classes=12)}, "expected a callable 'absent'"),
        ({"model": ModelConfig("tiny_task:linear", source_classes=12)}, "expected a model with convolutions"),
        ({"model": ModelConfig("tiny_task:build", source_classes=5)}, "expected at most 5 target classes"),
        (
            {"model": ModelConfig("tiny_task:wrong", source_classes=12)},
            r"expected logits \[2, 12\] of 2 images",
        ),
        (
            {"model": ModelConfig("tiny_task:narrow", source_classes=12)},
            r"that takes images \[N, 3, 16, 16\]",
        ),
        (
            {"pretrain": dataclasses.replace(RunConfig().pretrain, epochs=1)},
            "expected model.source_classes=52 to learn letters, got 12",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_clear_message(
    tmp_path: Path, tiny_task: ModuleType, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        execute(tmp_path, tiny_task.make_config(**changes), "search")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a run folder with run\.json, got"):
        load_config(tmp_path)


def test_run_json_says_with_what_the_run_began(tmp_path: Path, tiny_task: ModuleType) -> None:
    execute(tmp_path, tiny_task.make_config(), "pretrain")
    content = read_json(tmp_path / "run.json")
    assert content["schema_version"] == 1
    assert content["threads"] == 1
    assert content["versions"]["torch"] == str(torch.__version__)
    assert RunConfig.from_dict(content["config"]) == tiny_task.make_config()
