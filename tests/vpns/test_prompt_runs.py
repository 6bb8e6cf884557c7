"""Do runs with every prompt and every label map end, and end alike where they were interrupted?"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vpns.config import LabelMapConfig, PromptConfig, RunConfig, SearchConfig
from vpns.files import read_tensors
from vpns.label_map import LabelMap
from vpns.observe import Observer, Step
from vpns.run import execute
from vpns.stages import networks, search

FINAL = ("search/masks", "search/scores", "search/prompt", "search/network", "tune/weights", "tune/prompt",
         "eval/outputs")  # fmt: skip


class Stop(Observer):
    """Asks to stop, as Ctrl-C does, after some updates of search."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def on_step(self, step: Step) -> None:
        self.left -= step.stage == "search"
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def compare_interrupted(config: RunConfig, folder: Path, updates: int) -> None:
    whole = execute(folder / "whole", config, "eval")
    with pytest.raises(KeyboardInterrupt):
        execute(folder / "stopped", config, "eval", [Stop(updates)])
    assert (folder / "stopped" / "search" / "state.json").exists()
    resumed = execute(folder / "stopped", config, "eval")
    assert resumed["search"].result["label_map"] == whole["search"].result["label_map"]
    for name in FINAL:
        ours, theirs = (read_tensors(folder / run / f"{name}.safetensors") for run in ("stopped", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("fix", "framed"), ("random", "released"), ("random", "framed"), ("expand", "released")],
)
def test_a_run_with_any_prompt_resumes_bitwise(
    kind: str, variant: str, tmp_path: Path, tiny_task: ModuleType
) -> None:
    prompt = PromptConfig(kind=kind, variant=variant, canvas=16, frame=2)
    config = tiny_task.make_config(prompt=prompt)
    compare_interrupted(config, tmp_path, updates=5)
    learned = read_tensors(tmp_path / "whole" / "tune" / "prompt.safetensors")["raw"]
    assert (learned != 0).any()
    if kind == "fix":
        side = int((16**2 - 12**2) ** 0.5)
        assert (learned[:, side:] == 0).all()
        assert (learned[:, :, side:] == 0).all()


def test_a_map_is_counted_on_images_whose_square_stands_still(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    counted = networks.count_predictions

    def noted(network: nn.Module, inputs: Iterator[tuple[Tensor, Tensor]], classes: int) -> Tensor:
        batches = list(inputs)
        shown.append(torch.cat([images for images, _ in batches]))
        return counted(network, batches, classes)

    monkeypatch.setattr(networks, "count_predictions", noted)
    prompt = PromptConfig(kind="random", canvas=16, frame=2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        execute(tmp_path / str(seed), tiny_task.make_config(prompt=prompt), "search")
    assert torch.equal(*shown)


@pytest.mark.parametrize("updates", [3, 4])
def test_an_iterative_label_map_follows_search_and_resumes_bitwise(
    updates: int, tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the end of an epoch of three updates, and in the midst of the next."""
    maps: list[tuple[int, list[int]]] = []
    found = search.find_label_map

    def noted(*arguments: object) -> object:
        epoch = arguments[4] if len(arguments) > 4 else 0
        # A network as small as this one always counts alike.
        label_map = LabelMap(found(*arguments).sequence.roll(epoch))
        maps.append((epoch, label_map.sequence.tolist()))
        return label_map

    monkeypatch.setattr(search, "find_label_map", noted)
    settings = SearchConfig(epochs=4, batch_size=20, lr=5e-2, schedule="constant")
    config = tiny_task.make_config(label_map=LabelMapConfig("iterative"), search=settings)
    compare_interrupted(config, tmp_path, updates)
    of_whole = maps[:4]
    assert [epoch for epoch, _ in of_whole] == [0, 1, 2, 3]
    # What the best epoch was validated with is what the run goes on with.
    result = execute(tmp_path / "whole", config, "search")["search"].result
    best = dict(of_whole)[max(0, result["best_epoch"] - 1)]
    assert result["label_map"] == best


def test_a_frequency_map_is_counted_once(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    found = search.find_label_map

    def noted(*arguments: object) -> object:
        nonlocal count
        count += 1
        return found(*arguments)

    monkeypatch.setattr(search, "find_label_map", noted)
    execute(tmp_path, tiny_task.make_config(), "search")
    assert count == 1
