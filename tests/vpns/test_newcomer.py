"""Can a newcomer prune an own model on own images by the README alone? With its own code and command."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vpns.cli import main
from vpns.files import read_json

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
# What the README's command would do in an hour, in seconds: small images and few epochs.
QUICK = (
    "--prompt.canvas=32", "--prompt.frame=4", "--search.epochs=2", "--search.batch_size=24",
    "--tune.epochs=4", "--tune.batch_size=24", "--threads=1",
)  # fmt: skip
COLOURS = {"apple": (200, 30, 30), "leaf": (30, 180, 40), "sky": (40, 60, 220)}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with mymodel.py as the README prints it, and photos of two sizes in three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    (block,) = re.findall(r"```python\n(# mymodel\.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "mymodel.py").write_text(block)
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(40):
            shape = (40, 30, 3) if number % 2 else (24, 24, 3)
            pixels = np.clip(np.array(colour) + noise.normal(0, 40, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def readme_command() -> list[str]:
    """The command for own data and model, without its first word."""
    (block,) = re.findall(r"```\n(vpns run runs/mine .*?)```", README, re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))[1:]


def save_own_weights() -> None:
    """What the newcomer has trained elsewhere, for the README's 1,000 classes."""
    torch.manual_seed(0)
    network = importlib.import_module("mymodel").factory(num_classes=1000)
    save_file(network.state_dict(), "mine.safetensors")


def test_the_readmes_command_prunes_an_own_model_on_own_images(desk: Path) -> None:
    save_own_weights()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "vpns", *readme_command(), *QUICK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    report = read_json(desk / "runs/mine/report/report.json")
    # 0.2 of the 120 photos each; a colour is no hard task.
    assert (report["test_images"], report["val_images"]) == (24, 24)
    assert report["dense_accuracy"] > 90
    assert report["accuracy"] > 90
    assert (report["model"], report["data"]) == ("mymodel:factory", "folder")
    assert (report["pattern"], report["density"]) == ("block:32x32", 0.1)
    assert abs(report["unit_density"] - 0.1) < 0.005
    assert report["dense_ms"] > 0
    assert report["sparse_ms"] > 0
    for leaf in (
        "report/report.md",
        "export/artifact/manifest.json",
        "bench/bench.json",
        "eval/outputs.safetensors",
    ):
        assert (desk / "runs/mine" / leaf).stat().st_size > 0
    weights = load_file(desk / "runs/mine/tune/weights.safetensors")
    assert weights.keys() == load_file("mine.safetensors").keys()
    zeros = sum(int((tensor == 0).sum()) for tensor in weights.values() if tensor.dim() > 1)
    assert zeros / sum(tensor.numel() for tensor in weights.values() if tensor.dim() > 1) > 0.8


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("label_map", ["frequency", "head"])
def test_without_weights_the_own_network_learns_letters_first(label_map: str) -> None:
    options = ["--data.name=folder", "--data.root=photos", "--model.name=mymodel:factory", *QUICK]
    options += ["--pretrain.epochs=1", f"--label_map.kind={label_map}", "--pattern=channel", "--density=0.5"]
    assert main(["eval", "letters", *options]) == 0
    assert read_json(Path("letters/pretrain/stage.json"))["result"]["source"] == "letters"
    result = read_json(Path("letters/eval/stage.json"))["result"]
    assert result["class_names"] == sorted(COLOURS)
    assert result["accuracy"] > 60
    before = Path("letters/tune/weights.safetensors").stat().st_mtime_ns
    assert main(["eval", "letters"]) == 0
    assert Path("letters/tune/weights.safetensors").stat().st_mtime_ns == before
