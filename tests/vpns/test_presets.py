"""Are the presets the paper's settings, and is a mistyped one answered with those that are near?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vpns.small_sets import make_set
from vpns import cli
from vpns.config import RunConfig, SearchConfig, TuneConfig
from vpns.data import LAYOUTS
from vpns.files import read_json
from vpns.models import build_model
from vpns.preset_files import find_preset, list_presets
from vpns.stages.networks import stage_passes

ADAM4, ADAM3, SGD2, SGD4, SGD05 = ("adam", 1e-4), ("adam", 1e-3), ("sgd", 1e-2), ("sgd", 1e-4), ("sgd", 0.05)
# The authors' scripts: network, data, batch, epochs of search and tune, optimizers of scores and weights.
PUBLISHED = {
    "resnet18-cifar10": ("resnet18", "cifar10", 256, (30, 30), ADAM4, SGD2),
    "resnet18-cifar100": ("resnet18", "cifar100", 256, (30, 30), ADAM4, SGD2),
    "resnet18-tiny-imagenet": ("resnet18", "tiny-imagenet", 256, (30, 30), ADAM4, SGD2),
    "resnet18-food101": ("resnet18", "food101", 256, (30, 30), ADAM4, SGD2),
    "resnet18-dtd": ("resnet18", "dtd", 64, (30, 30), ADAM4, SGD2),
    "resnet18-oxford-pets": ("resnet18", "oxford-pets", 64, (30, 30), SGD05, SGD2),
    "resnet18-flowers102": ("resnet18", "flowers102-coop", 128, (30, 30), ADAM3, ADAM3),
    "resnet18-stanford-cars": ("resnet18", "stanford-cars", 128, (30, 30), ADAM3, ADAM3),
    "resnet50-tiny-imagenet": ("resnet50", "tiny-imagenet", 256, (30, 30), ADAM4, SGD4),
    "resnet50-cifar100": ("resnet50", "cifar100", 256, (30, 30), ADAM4, SGD2),
    "vgg16_bn-tiny-imagenet": ("vgg16_bn", "tiny-imagenet", 128, (20, 20), ADAM4, SGD2),
    "vgg16_bn-cifar100": ("vgg16_bn", "cifar100", 256, (20, 20), SGD2, SGD2),
    "mobilenet_v2-cifar100": ("mobilenet_v2", "cifar100", 256, (30, 30), ADAM4, SGD2),
    "resnet18-imagenet": ("resnet18", "imagenet", 256, (10, 10), SGD2, SGD2),
    "resnet18-imagenet-transfer": ("resnet18", "imagenet", 1024, (30, 0), ADAM4, SGD2),
    "hydra-resnet18-cifar100": ("resnet18", "cifar100", 256, (60, 60), SGD2, SGD2),
    "hydra-resnet18-cifar100-two-updates": ("resnet18", "cifar100", 256, (30, 30), SGD2, SGD2),
}


def config_of(name: str, *options: str) -> RunConfig:
    return cli.parse(["run", "--preset", name, *options]).config


def test_every_preset_is_in_the_table() -> None:
    assert list_presets() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings(name: str) -> None:
    network, data, batch, epochs, scores, weights = PUBLISHED[name]
    config = config_of(name)
    assert (config.model.name, config.data.name, config.model.source_classes) == (network, data, 1000)
    version = "V2" if network == "resnet50" else "V1"
    assert config.model.weights == f"torchvision:IMAGENET1K_{version}"
    for stage, count, (optimizer, lr) in (
        (config.search, epochs[0], scores),
        (config.tune, epochs[1], weights),
    ):
        assert isinstance(stage, SearchConfig | TuneConfig)
        assert (stage.epochs, stage.batch_size, stage.optimizer, stage.lr) == (count, batch, optimizer, lr)
        # The prompt learns as the stage's other group does.
        assert (stage.prompt_lr, stage.weight_decay, stage.momentum) == (None, 1e-4, 0.9)
        assert (stage.schedule, stage.accumulate) == ("cosine", 1)
    assert (config.pattern, config.schedule, config.seed) == ("unstructured", "joint", 7)
    assert (config.data.flip, config.data.crop, config.data.load_size) == (True, True, 0)
    assert config.label_map.kind == ("identity" if data == "imagenet" else "frequency")
    assert config.method == ("hydra" if name.startswith("hydra") else "vpns")
    assert config.prompt.canvas == 224
    if name != "hydra-resnet18-cifar100":
        assert (config.prompt.kind, config.prompt.variant, config.prompt.frame) == ("pad", "released", 16)
        assert config.prompt.at_inference is None


def test_hydra_has_both_budgets() -> None:
    """Each 120 epochs of updates: 60 + 60 of one, or 30 + 30 of two."""
    for name in ("hydra-resnet18-cifar100", "hydra-resnet18-cifar100-two-updates"):
        config = config_of(name)
        passes = {stage: len(stage_passes(config, stage)) for stage in ("search", "tune")}
        assert config.search.epochs * passes["search"] + config.tune.epochs * passes["tune"] == 120


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_preset_names_is_known(name: str) -> None:
    config = config_of(name)
    assert config.data.name in LAYOUTS
    published = LAYOUTS[config.data.name].published
    assert published is not None
    assert published.classes <= config.model.source_classes
    with torch.device("meta"):
        network = build_model(replace(config.model, weights=None), config.model.source_classes, seed=7)
    assert sum(parameter.numel() for parameter in network.parameters()) > 1e6


def test_options_and_files_override_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("density: 0.3\nsearch:\n  epochs: 2\n")
    for options in (["--config", str(file), "--density=0.2"], ["--density=0.2", f"--config={file}"]):
        config = config_of("resnet18-dtd", *options)
        assert (config.density, config.search.epochs, config.search.batch_size) == (0.2, 2, 64)
    assert cli.parse(["run", "--preset=resnet18-dtd"]).folder == Path("runs/resnet18-dtd")
    assert cli.parse(["run", "x", "--preset", "resnet18-dtd"]).folder == Path("x")


def test_a_mistyped_preset_is_answered_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--preset", "resnet18-cifar1OO"]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert "got 'resnet18-cifar1OO' (did you mean resnet18-cifar10" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=r"got 'qqq'$"):
        find_preset("qqq")


@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize(
    ("preset", "home"), [("resnet18-dtd", "dtd/dtd"), ("resnet18-cifar100", "cifar-100-python")]
)
def test_a_preset_runs_and_resumes_on_a_miniature_of_its_data(
    preset: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set(home, tmp_path / "data", monkeypatch)
    monkeypatch.chdir(tmp_path)
    options = ["--model.name=tiny_task:build", "--model.source_classes=12", "--model.weights=null"]
    options += ["--prompt.canvas=16", "--prompt.frame=2", "--pretrain.epochs=0", "--threads=1"]
    options += ["--search.epochs=2", "--tune.epochs=2", "--data.val_fraction=0.2"]
    assert cli.main(["search", "--preset", preset, *options]) == 0
    folder = tmp_path / "runs" / preset
    before = (folder / "search" / "scores.safetensors").read_bytes()
    assert cli.main(["eval", f"runs/{preset}"]) == 0
    assert (folder / "search" / "scores.safetensors").read_bytes() == before
    result = read_json(folder / "eval" / "stage.json")["result"]
    assert len(result["class_names"]) == 3
    # Prompted and plain: two updates per iteration, of one batch.
    tuned = read_json(folder / "tune" / "stage.json")["result"]
    assert tuned["updates"] == 2 * 2
    # Data that broke meanwhile are refused, and what was done stays.
    max(path for path in (tmp_path / "data" / home).rglob("*") if path.is_file()).unlink()
    (folder / "eval" / "stage.json").unlink()
    assert cli.main(["eval", f"runs/{preset}"]) == cli.EXIT_ERROR
    assert (folder / "search" / "scores.safetensors").read_bytes() == before
