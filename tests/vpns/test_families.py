"""Are networks of torchvision and timm pruned, tuned, saved and reloaded by their names alone?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpns.bench.subject import load_subject
from vpns.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    TuneConfig,
)
from vpns.models import build_model
from vpns.run import execute

CLASSES, CANVAS, DENSITY = 12, 32, 0.3
QUICK = {
    "timm:resnet10t": "block:16x16",
}
SLOW = {
    "mobilenet_v2": "channel",
    "timm:mobilenetv3_small_050": "unstructured",
    "mnasnet0_5": "unstructured",
    "shufflenet_v2_x0_5": "block:8x8",
    "squeezenet1_1": "block:16x16",
    "resnext50_32x4d": "block:4x4",
    "efficientnet_b0": "block:8x8",
    "regnet_y_400mf": "block:16x16",
    "densenet121": "unstructured",
    "timm:convnext_atto": "block:8x8",
    "timm:regnetx_002": "block:8x8",
    "timm:ghostnet_050": "unstructured",
    "timm:resnet18d": "channel",
}


def check(name: str, pattern: str, folder: Path) -> None:
    """With weights from a file, as whoever downloaded them has it."""
    source = build_model(ModelConfig(name), CLASSES, seed=3)
    save_file(source.state_dict(), folder / "published.safetensors")
    config = RunConfig(
        data=DataConfig(train_count=40),
        model=ModelConfig(name, str(folder / "published.safetensors"), CLASSES),
        prompt=PromptConfig(canvas=CANVAS, frame=2),
        pattern=pattern,
        density=DENSITY,
        search=SearchConfig(epochs=1, batch_size=20),
        tune=TuneConfig(epochs=1, batch_size=20),
        threads=1,
    )
    records = execute(folder / "run", config, "export")
    tuned = load_file(folder / "run" / "tune" / "weights.safetensors")
    assert tuned.keys() == source.state_dict().keys()
    layers = records["search"].result["layers"]
    assert len(layers) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in source.modules())
    kept = {row["layer"]: row["kept"] for row in layers}
    assert all(int((tuned[f"{layer}.weight"] != 0).sum()) <= count for layer, count in kept.items())
    share = sum(kept.values()) / sum(row["weights"] for row in layers)
    # Of channels few go from both sides of a layer; of blocks ragged ones count as whole.
    assert share < 0.6 if pattern == "channel" else abs(share - DENSITY) < 0.05
    weights = {name: tuned[f"{name}.weight"] for name in kept}
    before = {name: source.get_submodule(name).weight * (weight != 0) for name, weight in weights.items()}
    assert not same(weights, before)
    x = torch.rand(4, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(1))
    # Images in, the task's logits out: prompt and label map are around it.
    reloaded = load_subject(str(folder / "run" / "export" / "artifact")).network.get_submodule("network")
    assert same(reloaded.state_dict(), tuned)
    again = load_subject(str(folder / "run")).network
    with torch.no_grad():
        assert torch.equal(again.eval()(x), reloaded.eval()(x))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", QUICK)
def test_a_published_network_is_pruned_tuned_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    check(name, QUICK[name], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_more_published_networks_are_pruned_tuned_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    check(name, SLOW[name], tmp_path)


@pytest.mark.long
def test_a_vision_transformer_needs_its_own_canvas_and_is_told_so(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig("timm:vit_tiny_patch16_224", source_classes=CLASSES),
        data=DataConfig(train_count=40),
        pretrain=PretrainConfig(epochs=0),
    )
    with pytest.raises(ValueError, match=r"images \[N, 3, 32, 32\].*doesn't match model.*prompt\.canvas"):
        execute(tmp_path, config, "pretrain")


def test_a_name_of_both_libraries_is_torchvisions_unless_timm_is_asked_for() -> None:
    ours, theirs = (build_model(ModelConfig(name), 5, seed=1) for name in ("resnet34", "timm:resnet34"))
    assert type(ours).__module__.startswith("torchvision.")
    assert type(theirs).__module__.startswith("timm.")
    assert same(ours.state_dict(), build_model(ModelConfig("torchvision:resnet34"), 5, seed=1).state_dict())
    assert not same(ours.state_dict(), build_model(ModelConfig("resnet34"), 5, seed=2).state_dict())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet18x", r"got 'timm:resnet18x' \(looked in vpns\.models, timm; did you mean resnet18"),
        ("torchvision:resnet10t", r"torchvision; did you mean resnet1"),
        ("mobilnet_v2", r"torchvision and timm; did you mean mobilenet_v2"),
        ("qqqqqq", r"got 'qqqqqq' \(looked in vpns\.models, torchvision and timm\)"),
    ],
)
def test_a_name_that_nobody_has_is_refused_with_those_that_are_near(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_model(ModelConfig(name), 5, seed=1)


def test_without_timm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NotImplementedError, match=r"expected timm to be installed.*\.\[timm\]"):
        build_model(ModelConfig("timm:resnet10t"), 5, seed=1)


def fake_timm(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> nn.Module:
    """timm with one network whose weights arrive, or do not."""
    published = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 5))

    def create(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        assert name in ("net", "net.best")
        if error is not None:
            raise error
        return published

    module = ModuleType("timm")
    vars(module).update(
        is_model=lambda name: name == "net",
        list_pretrained=lambda wanted: ["net.best"],
        create_model=create,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "timm", module)
    return published


@pytest.mark.parametrize("tag", ["best", "default"])
def test_timms_weights_are_fetched_by_tag(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpns.models import load_weights

    published = fake_timm(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 5))
    load_weights(model, f"timm:{tag}", "timm:net")
    assert same(model.state_dict(), published.state_dict())
    with pytest.raises(ValueError, match=r"default or one of \['best'\] for net, got 'worst'"):
        load_weights(model, "timm:worst", "net")
    with pytest.raises(ValueError, match=r"expected an architecture of timm, got 'own:net'"):
        load_weights(model, "timm:best", "own:net")
    fake_timm(monkeypatch, RuntimeError("no route"))
    with pytest.raises(ConnectionError, match=r"download best of net, got no route .*takes a file"):
        load_weights(model, "timm:best", "net")
