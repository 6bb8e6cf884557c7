"""Are settings checked where they are made, and two runs told apart by the settings that matter?"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vpns.config import (
    DataConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    StageConfig,
    TuneConfig,
    differing_keys,
)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_outside_zero_to_one_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"RunConfig: expected density.*in \(0, 1\], got"):
        RunConfig(density=density)


def test_a_frame_wider_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PromptConfig: expected 0 <= 2 \* frame < canvas=32, got frame=16"):
        PromptConfig(canvas=32, frame=16)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (StageConfig, {"epochs": -1}),
        (StageConfig, {"batch_size": 0}),
        (StageConfig, {"lr": 0.0}),
        (StageConfig, {"prompt_lr": -1.0}),
        (StageConfig, {"weight_decay": -1e-4}),
        (StageConfig, {"momentum": 1.0}),
        (DataConfig, {"val_fraction": 1.0}),
        (DataConfig, {"train_count": 0}),
        (DataConfig, {"load_size": -8}),
        (ModelConfig, {"source_classes": 0}),
        (PromptConfig, {"canvas": 0}),
        (RunConfig, {"threads": -1}),
        (RunConfig, {"seed": -1}),
        (RunConfig, {"save_every_s": -1.0}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(kind: type[Any], setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected .*{next(iter(setting))}"):
        kind(**setting)


def test_settings_survive_json() -> None:
    config = RunConfig(density=0.5, search=SearchConfig(lr=0.25), data=DataConfig("folder", root="images"))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="densty"):
        RunConfig.from_dict({"densty": 0.1})
    with pytest.raises(TypeError, match="learning_rate"):
        RunConfig.from_dict({"search": {"learning_rate": 0.1}})


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().density = 2.0  # type: ignore[misc]


def test_differences_are_named_by_their_dotted_keys() -> None:
    theirs = RunConfig(density=0.5, tune=TuneConfig(epochs=1), model=ModelConfig(weights="a.pth"))
    assert differing_keys(RunConfig(), theirs) == ["model.weights", "density", "tune.epochs"]


def test_threads_device_and_saving_make_no_other_run() -> None:
    assert differing_keys(RunConfig(), RunConfig(threads=7, device="meta", save_every_s=1.0)) == []
