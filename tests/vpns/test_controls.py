"""Does every control of the comparisons do what its name says, and leave the rest alone?"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vpns.batches import derive_seed
from vpns.config import LabelMapConfig, PromptConfig, SearchConfig, TuneConfig
from vpns.files import read_tensors
from vpns.models import find_head, replace_head
from vpns.run import execute, open_finished
from vpns.stages import search, tune


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "mask_then_prompt"},
        {"schedule": "prompt_then_mask"},
        {"prompt": PromptConfig(canvas=16, frame=2, variant="released")},
        {"prompt": PromptConfig(canvas=16, frame=2, frozen=True)},
        {"prompt": PromptConfig(canvas=16, frame=2, prompt_in="search")},
        {"prompt": PromptConfig(canvas=16, frame=2, prompt_in="tune", at_inference=False)},
        {"prompt": PromptConfig(canvas=16, frame=2, prompt_in="none")},
        {"prompt": PromptConfig(canvas=16, kind="none", frame=0)},
        {"label_map": LabelMapConfig("identity")},
        {"label_map": LabelMapConfig("head")},
        {"search": SearchConfig(epochs=2, batch_size=20, passes=2), "tune": TuneConfig(epochs=2, passes=2)},
        {"search": SearchConfig(epochs=0), "tune": TuneConfig(epochs=0)},
    ],
    ids=str,
)
def test_every_control_runs_to_its_end(
    tmp_path: Path, tiny_task: ModuleType, changes: dict[str, Any]
) -> None:
    config = tiny_task.make_config(**changes)
    execute(tmp_path, config, "eval")
    finished = open_finished(tmp_path).finished
    raw = read_tensors(tmp_path / "tune" / "prompt.safetensors").get("raw")
    if config.prompt.kind == "none":
        assert raw is None
    else:
        assert raw is not None
        is_learned = (
            not config.prompt.frozen and config.prompt.prompt_in != "none" and config.search.epochs > 0
        )
        assert bool(raw.any()) == is_learned
    assert finished["search"].result["updates"] == 3 * config.search.epochs * (
        2 if config.search.passes == 2 or config.prompt.variant == "released" else 1
    )
    assert finished["dense"].result["updates"] == finished["tune"].result["updates"]
    is_prompted = finished["eval"].result["is_prompted"]
    if config.prompt.variant == "released" or config.prompt.prompt_in in ("search", "none"):
        assert not is_prompted


def test_a_frozen_prompt_and_masks_stay_as_search_left_them(tmp_path: Path, tiny_task: ModuleType) -> None:
    execute(
        tmp_path, tiny_task.make_config(prompt=PromptConfig(canvas=16, frame=2, prompt_in="search")), "tune"
    )
    for name in ("masks", "prompt"):
        found, tuned = (read_tensors(tmp_path / s / f"{name}.safetensors") for s in ("search", "tune"))
        assert all(torch.equal(found[key], tuned[key]) for key in found)


@pytest.mark.parametrize("schedule", ["joint", "mask_then_prompt", "prompt_then_mask"])
def test_a_new_head_goes_on_from_search_to_tune_under_every_schedule(
    tmp_path: Path, tiny_task: ModuleType, schedule: str
) -> None:
    config = tiny_task.make_config(label_map=LabelMapConfig("head"), schedule=schedule)
    execute(tmp_path, config, "search")
    _, start = find_head(replace_head(tiny_task.build(12), 10, derive_seed(config.seed, "head")))
    found = read_tensors(tmp_path / "search" / "network.safetensors")["fc.weight"]
    # Learned, unless the best epoch came before the half that teaches it; and what tune begins with.
    if schedule != "prompt_then_mask":
        assert (found - start.weight).abs().max() > 1e-4
    assert torch.equal(tune._load_found(open_finished(tmp_path)).fc.weight, found)


def test_the_label_map_is_counted_on_images_as_the_first_half_shows_them(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[bool]] = {"joint": [], "mask_then_prompt": [], "prompt_then_mask": []}
    found = search.find_label_map

    for schedule, told in seen.items():

        def noted(*arguments: Any, told: list[bool] = told) -> object:
            told.append(arguments[5])
            return found(*arguments)

        monkeypatch.setattr(search, "find_label_map", noted)
        execute(tmp_path / schedule, tiny_task.make_config(schedule=schedule), "search")
    assert seen == {"joint": [True], "mask_then_prompt": [False], "prompt_then_mask": [True]}
