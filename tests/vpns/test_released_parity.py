"""Does the variant `released` do what the published formulas say? Checked update by update.

The stages run as a user's do, through files and all, but in float64; after every update all that learns is
compared with an independent transcription, which sees the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vpns.batches
import vpns.stages.loop
import vpns.stages.networks
from tests.vpns.released_transcription import Released, resnet18, vgg16
from vpns.batches import Batch, iterate_epoch
from vpns.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    TuneConfig,
)
from vpns.data import DATASETS, ImageSet, Split, make_batch
from vpns.files import read_tensors
from vpns.label_map import LabelMap
from vpns.masking import attach_masks, refresh
from vpns.methods import Start, find_method
from vpns.models import MODELS, build_model
from vpns.observe import EpochMetrics, Observer, StageStart
from vpns.optimizers import build_optimizer
from vpns.predictor import Predictor
from vpns.prompt import Prompt, build_prompt
from vpns.run import execute
from vpns.state import read_stage
from vpns.step import Learner, train_step
from vpns_kernels.convert import mask_modules
from vpns_kernels.patterns import parse_pattern
from vpns_kernels.refresh import refresh_mask

CANVAS, FRAME = 32, 4
# Of this one, the published count keeps one weight more than rounding does, in both networks.
DENSITY = 0.103
CLASSES, IMAGES = 3, 4
SEQUENCE = [4, 0, 11]
UNSTRUCTURED = parse_pattern("unstructured")
FORWARDS = {"resnet18": resnet18, "vgg16_narrow": vgg16, "vgg16": vgg16}


def vgg16_narrow(num_classes: int) -> nn.Module:
    """VGG-16 with all its convolutions and narrow linear layers: 15 of 138 million weights; biases not 0."""
    with torch.device("meta"):
        network = MODELS["vgg16"](num_classes)
    assert isinstance(network.classifier, nn.Sequential)
    for place, (inputs, outputs) in {0: (512 * 7 * 7, 8), 3: (8, 32), 6: (32, num_classes)}.items():
        network.classifier[place] = nn.Linear(inputs, outputs, device="meta")
    network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:
            nn.init.kaiming_normal_(parameter)
    return network


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, prompts and constants are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def load_noise(config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """A few images; some pixels are 0 or 1, where the clamp acts."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(IMAGES, 3, CANVAS, CANVAS, generator=generator) * 400 - 70).clamp(0, 255)
    split = Split(images.to(torch.uint8), torch.arange(IMAGES) % CLASSES)
    return ImageSet(split, split, split, tuple("abc"))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow network and the few images, by name."""
    monkeypatch.setitem(MODELS, "vgg16_narrow", vgg16_narrow)
    monkeypatch.setitem(DATASETS, "noise", load_noise)


def make_config(model: str, epochs: int, batch_size: int) -> RunConfig:
    """The published hyper-parameters."""
    return RunConfig(
        data=DataConfig("noise"),
        model=ModelConfig(model),
        prompt=PromptConfig(variant="released", canvas=CANVAS, frame=FRAME),
        pattern="unstructured",
        density=DENSITY,
        backend="reference",
        pretrain=PretrainConfig(epochs=0),
        search=SearchConfig(epochs=epochs, batch_size=batch_size, lr=1e-4, prompt_lr=1e-4),
        tune=TuneConfig(epochs=epochs, batch_size=batch_size),
        threads=1,
        save_every_s=1e9,
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value."""
    difference = float((ours.double() - theirs.double()).abs().max())
    return difference and difference / float(theirs.double().abs().max())


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-9, f"{what}: {worst} differs by {errors[worst]}"


class Lockstep(Observer):
    """Repeats each update of a run with the transcription and compares all that either of them changes."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.mapped: list[Batch] = []
        self.seen: list[Batch] = []
        self.released: Released
        # What the transcription held after each epoch of mask finding.
        self.epochs: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = []
        self.stage = ""

    def on_start(self, start: StageStart) -> None:
        self.stage = start.stage
        if start.stage == "search":
            self._begin_search()
        else:
            self._begin_tune()

    def on_eval(self, metrics: EpochMetrics) -> None:
        self.released.end_epoch()
        if self.stage == "search":
            moved = (self.released.scores, self.released.state, self.released.prompt)
            self.epochs.append(copy.deepcopy(moved))

    def _begin_search(self) -> None:
        state = read_tensors(self.folder / "pretrain" / "weights.safetensors")
        forward = FORWARDS[self.config.model.name]
        self.released = Released(state, forward, CANVAS, FRAME, DENSITY)
        self.released.map_labels([(batch.images, batch.labels) for batch in self.mapped], classes=CLASSES)
        self.released.begin_mask_finding(self.config.search.epochs)

    def _begin_tune(self) -> None:
        """From the epoch that validation chose, since the published code always took the last."""
        record = read_stage(self.folder / "search")
        assert record is not None
        scores, state, prompt = self.epochs[record.result["best_epoch"] - 1]
        self.released.scores, self.released.state, self.released.prompt = scores, state, prompt
        self.released.update_tau()
        kept = torch.cat([s.detach().abs().flatten() for s in scores.values()])
        assert (
            relative_error(torch.tensor(record.result["threshold"]), kept[kept > self.released.tau].min())
            < 1e-12
        )
        assert record.result["kept"] == sum(int(mask.sum()) for mask in self.released.masks().values())
        self.released.begin_tuning(self.config.tune.epochs)

    def step(self, learner: Learner, parts: list[Batch]) -> tuple[float, int]:
        """In place of train_step."""
        generator = torch.get_rng_state()
        (batch,) = parts
        loss, right = train_step(learner, parts)
        torch.set_rng_state(generator)
        expected = self.released.update(batch.images, batch.labels, batch.prompted)
        assert abs(loss - expected) < 1e-9 * expected
        self.seen.append(batch)
        self._compare(learner)
        return loss, right

    def _compare(self, learner: Learner) -> None:
        where = f"{self.stage}, update {len(self.seen)}"
        released, masked = self.released, mask_modules(learner.predictor.network)
        assert learner.label_map.sequence is not None
        assert learner.label_map.sequence.tolist() == released.sequence
        masks = released.masks()
        assert masked.keys() == masks.keys()
        for name, module in masked.items():
            assert torch.equal(module.mask, masks[name]), f"{where}: mask of {name}"
        assert_close({n: m.scores.detach() for n, m in masked.items()}, detach(released.scores), where)
        own = [f"{name}.{what}" for name in masked for what in ("scores", "mask")]
        state = {n: t for n, t in learner.predictor.network.state_dict().items() if n not in own}
        assert_close(state, detach(released.state), where)
        assert_close(
            {"raw": detach(learner.predictor.prompt.state_dict())["raw"]},
            {"raw": released.prompt.detach()},
            where,
        )


def detach(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def run_in_lockstep(folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Lockstep:
    lockstep = Lockstep(folder, config)

    def make_double(*arguments: Any, **options: Any) -> Tensor:
        return make_batch(*arguments, **options).double()

    def record_mapped(*arguments: Any) -> Iterator[tuple[Batch, ...]]:
        for batches in iterate_epoch(*arguments):
            lockstep.mapped += batches
            yield batches

    monkeypatch.setattr(vpns.batches, "make_batch", make_double)
    monkeypatch.setattr(vpns.stages.networks, "iterate_epoch", record_mapped)
    monkeypatch.setattr(vpns.stages.loop, "train_step", lockstep.step)
    execute(folder, config, "tune", [lockstep])
    return lockstep


def is_augmented(batch: Batch) -> bool:
    """Whether images are not simply those of the training split."""
    train = load_noise(DataConfig("noise"), 7, CANVAS).train
    plain = make_batch(train.images, CANVAS).double()
    return not all(any(torch.equal(image, other) for other in plain) for image in batch.images)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model", "epochs", "batch_size"),
    [
        ("resnet18", 3, 4),
        ("vgg16_narrow", 1, 4),
        pytest.param("vgg16_narrow", 3, 2, marks=pytest.mark.long),
    ],
)
def test_both_stages_do_what_the_published_formulas_say(
    model: str, epochs: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(model, epochs, batch_size)
    lockstep = run_in_lockstep(tmp_path, config, monkeypatch)
    assert [batch.prompted for batch in lockstep.seen] == [True, False] * (2 * epochs * IMAGES // batch_size)
    for batch in lockstep.seen:
        assert is_augmented(batch) != batch.prompted
    final = read_tensors(tmp_path / "tune" / "prompt.safetensors")["raw"]
    assert final[:, :FRAME].abs().max() > 0


def make_learner(model: str) -> Learner:
    """The project's learner before its first update, in float64; all that either stage trains is learned."""
    network = build_model(ModelConfig(model), 20, seed=5)
    scores = find_method("vpns").start_scores(Start(network, None, UNSTRUCTURED, seed=0))
    masked = attach_masks(network, UNSTRUCTURED, scores)
    refresh(masked, UNSTRUCTURED, DENSITY, "published")
    masked.requires_grad_(True)
    prompt = build_prompt(PromptConfig(variant="released", canvas=CANVAS, frame=FRAME))
    return assemble(masked, prompt)


def assemble(network: nn.Module, prompt: Prompt) -> Learner:
    optimizer = build_optimizer(TuneConfig(), network.parameters(), prompt.parameters())
    return Learner(
        Predictor(prompt, network), LabelMap(torch.tensor(SEQUENCE)), optimizer, refresh=lambda: None
    )


def transcribe(learner: Learner, dtype: torch.dtype, model: str) -> Released:
    """The transcription in the learner's state, rounded to a precision."""
    state = {
        n: t for n, t in learner.predictor.network.state_dict().items() if not n.endswith(("scores", "mask"))
    }
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    released = Released(state, FORWARDS[model], CANVAS, FRAME, density=1.0)
    # Sign and mask are all that gradients take of the scores; rounded magnitudes could tie with tau.
    for name, module in mask_modules(learner.predictor.network).items():
        released.scores[name] = (module.scores.detach().sign() * (1 + module.mask.int())).to(dtype)
    released.tau = 1.0
    released.sequence = SEQUENCE
    released.begin_tuning(epochs=1)
    for scores in released.scores.values():
        scores.requires_grad_(True)
    return released


def gradients(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Of one update, by name."""
    torch.manual_seed(0)
    train_step(learner, [batch])
    modules = (("", learner.predictor.network), ("prompt.", learner.predictor.prompt))
    named = {f"{prefix}{n}": p for prefix, module in modules for n, p in module.named_parameters()}
    return {n: p.grad for n, p in named.items() if p.grad is not None}


def released_gradients(released: Released, batch: Batch) -> dict[str, Tensor]:
    """The transcription's, by the project's names."""
    torch.manual_seed(0)
    released.update(batch.images, batch.labels, batch.prompted)
    named = {f"{name}.scores": scores for name, scores in released.scores.items()}
    named |= released.state | {"prompt.raw": released.prompt}
    return {n: t.grad for n, t in named.items() if t.grad is not None}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", ["resnet18", "vgg16_narrow"])
def test_float32_gradients_are_as_near_to_float64_as_those_of_the_published_formulas(model: str) -> None:
    learner = make_learner(model)
    images = torch.rand(4, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), prompted=True)
    rounded = replace(batch, images=images.float())
    truth = released_gradients(transcribe(learner, torch.float64, model), batch)
    usual = released_gradients(transcribe(learner, torch.float32, model), rounded)
    found = gradients(assemble(learner.predictor.network.float(), learner.predictor.prompt.float()), rounded)
    assert found.keys() == truth.keys() == usual.keys()
    assert len(found) == len(list(learner.predictor.network.parameters())) + 1
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        error, usual_error = (
            float((one - truth[name]).norm() / truth[name].norm()) for one in (grad, usual[name])
        )
        assert error <= 2 * usual_error, name
        assert error < 1e-4, name


@pytest.mark.parametrize("density", [0.9999, 0.75, 0.5, 0.1, 0.0001])
@pytest.mark.parametrize("levels", [0, 1, 3, 40])
def test_masks_and_ties_are_as_published(levels: int, density: float) -> None:
    """With few levels most scores tie, many of them at the threshold."""
    generator = torch.Generator().manual_seed(levels)
    shapes = {"a": (64, 16, 3, 3), "b": (32, 64, 1, 1), "c": (10, 32)}
    weights = {name: torch.rand(shape, generator=generator) - 0.5 for name, shape in shapes.items()}
    if levels:
        weights = {name: (weight * 2 * levels).round() / levels for name, weight in weights.items()}
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    released = Released(state, resnet18, CANVAS, FRAME, density)
    found = refresh_mask(list(released.scores.values()), UNSTRUCTURED, density, "published")
    masks = list(released.masks().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.masks, masks, strict=True))
    assert found.kept == sum(int(mask.sum()) for mask in masks)


def test_a_density_that_prunes_less_than_one_weight_prunes_none_as_published() -> None:
    weight = torch.arange(1.0, 101.0).reshape(10, 10)
    for density in (1.0, 0.995):
        released = Released({"fc.weight": weight}, resnet18, CANVAS, FRAME, density)
        (mask,) = refresh_mask([released.scores["fc"]], UNSTRUCTURED, density, "published").masks
        assert torch.equal(mask, released.masks()["fc"])
        assert bool(mask.all())
