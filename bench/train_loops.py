"""How are iterations of search and tuning run for a bench? Endless, one per call, each marking its phases.

Ours runs through the trainer's own pieces; the published scheme in torch is driven by the same update, so
that both mark the same phases at the same places: batch, forward, backward, optimizer, refresh.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.train_published import publish
from vpns.batches import Batch, iterate_epoch
from vpns.config import ModelConfig, PromptConfig, RunConfig, SearchConfig, TuneConfig
from vpns.data import ImageSet, Split
from vpns.label_map import LabelMap, identity_map
from vpns.masking import attach_masks, describe_masks, refresh, unit_scores
from vpns.methods import Start, find_method
from vpns.models import build_model
from vpns.optimizers import build_optimizer
from vpns.stages.context import Context
from vpns.stages.networks import make_predictor, make_prompt, stage_passes
from vpns.step import Learner, train_step
from vpns_kernels.convert import freeze, sparsify, weight_masks
from vpns_kernels.measure.timing import Laps
from vpns_kernels.patterns import Pattern, parse_pattern

CLASSES = 10


@dataclass(frozen=True)
class Sizes:
    """The network, what it sees, in pixels, and where it is."""

    model: str = "resnet18"
    canvas: int = 224
    frame: int = 16
    source_classes: int = 1000
    device: str = "cpu"


@dataclass(frozen=True)
class Cell:
    """One kind of iteration: all of its arms take turns."""

    stage: str
    variant: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.stage} {self.variant} batch {self.batch}"


@dataclass(frozen=True)
class Arm:
    """One way to compute an iteration.

    Args:
        who: "ours", "torch" or "torch.compile".
        start: of our scores: "uniform" gives every layer the density, "method" is what a run begins with.
        prompt_in: as in the settings of a run; "none" learns masks alone.
    """

    who: str
    dtype: str
    density: float
    pattern: str = "unstructured"
    start: str = "uniform"
    prompt_in: str = "both"

    @property
    def name(self) -> str:
        if self.who != "ours":
            return f"{self.who} {self.dtype}"
        words = [self.who, self.pattern, self.dtype, f"density {self.density:g}"]
        words += ["method's start"] if self.start == "method" else []
        words += ["no prompt"] if self.prompt_in == "none" else []
        return " ".join(words)


def build_loop(arm: Arm, cell: Cell, sizes: Sizes, folder: Path) -> Loop:
    """Iterations of an arm, ready to run; its settings and choices are kept in the folder."""
    config = make_config(arm, cell, sizes)
    context = Context(folder / arm.name.replace("/", "-"), config)
    context.images = _make_noise(2 * cell.batch, config.seed, sizes)
    context.stage_folder(cell.stage).mkdir(parents=True, exist_ok=True)
    network = build_model(config.model, config.model.source_classes, config.seed)
    return (_build_ours if arm.who == "ours" else _build_published)(arm, cell, sizes, context, network)


def make_config(arm: Arm, cell: Cell, sizes: Sizes) -> RunConfig:
    """As a run of the published hyper-parameters has it, on noise."""
    settings = {"epochs": 1, "batch_size": cell.batch, "schedule": "constant"}
    return RunConfig(
        model=ModelConfig(sizes.model, source_classes=sizes.source_classes),
        prompt=PromptConfig(
            variant=cell.variant, canvas=sizes.canvas, frame=sizes.frame, prompt_in=arm.prompt_in
        ),
        pattern=arm.pattern,
        density=arm.density,
        search=SearchConfig(**settings, lr=1e-4, prompt_lr=1e-4),
        tune=TuneConfig(**settings, lr=1e-3),
        dtype=arm.dtype,
        device=sizes.device,
    )


def _make_noise(count: int, seed: int, sizes: Sizes) -> ImageSet:
    """What images show does not matter for their cost."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, sizes.canvas, sizes.canvas)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % CLASSES).to(sizes.device)
    return ImageSet(split, split, split, tuple("0123456789"))


class Loop:
    """Endless iterations of a stage, one per call, which marks its phases."""

    def __init__(
        self,
        context: Context,
        stage: str,
        image_size: int,
        learner: Learner,
        layer_density: dict[str, float] | None = None,
    ) -> None:
        passes = stage_passes(context.config, stage)
        self.updates, self.layer_density = len(passes), layer_density
        self._batches = _endless(context, stage, image_size)
        self._laps = Laps()
        optimizer = _Watched(learner.optimizer, self._mark)
        refresh_masks = learner.refresh

        def watched_refresh() -> None:
            refresh_masks()
            self._mark("refresh")

        predictor = _WatchedPredictor(learner.predictor, self._mark)
        self.learner = Learner(predictor, learner.label_map, optimizer, watched_refresh)  # type: ignore[arg-type]

    def __call__(self, laps: Laps) -> None:
        self._laps = laps
        laps.skip()
        batches = next(self._batches)
        laps.mark("batch")
        for batch in batches:
            train_step(self.learner, [batch])

    def _mark(self, phase: str) -> None:
        self._laps.mark(phase)


def _endless(context: Context, stage: str, image_size: int) -> Iterator[tuple[Batch, ...]]:
    config = context.config
    passes, size = stage_passes(config, stage), config.search.batch_size
    for epoch in itertools.count():
        position = (stage, epoch, 0)
        yield from iterate_epoch(
            context.images.train, passes, position, size, image_size, config.data, config.seed
        )


class _WatchedPredictor(nn.Module):
    """A predictor whose end is the end of the forward pass."""

    def __init__(self, predictor: nn.Module, mark: Callable[[str], None]) -> None:
        super().__init__()
        self.predictor, self.mark = predictor, mark

    def forward(self, images: Tensor, prompted: bool) -> Tensor:
        logits: Tensor = self.predictor(images, prompted)
        self.mark("forward")
        return logits


class _Watched:
    """An optimizer whose step begins where the backward pass ends."""

    def __init__(self, optimizer: Any, mark: Callable[[str], None]) -> None:
        self.optimizer, self.mark = optimizer, mark

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self.mark("backward")
        self.optimizer.step()
        self.mark("optimizer")


def _build_ours(arm: Arm, cell: Cell, sizes: Sizes, context: Context, network: nn.Module) -> Loop:
    config, pattern = context.config, parse_pattern(arm.pattern)
    scores = start_scores(network, pattern, arm.start, config.seed)
    network = attach_masks(network, pattern, scores).to(context.device)
    masked, rule = network, "published" if cell.variant == "released" else "exact"

    def follow_scores() -> None:
        refresh(masked, pattern, config.density, rule)

    follow_scores()
    densities = {row["layer"]: row["weight_density"] for row in describe_masks(masked)}
    is_search = cell.stage == "search"
    if not is_search:
        network = sparsify(freeze(masked), weight_masks(masked), pattern).requires_grad_(True)
        network = network.to(context.device)
    prompt = make_prompt(context)
    settings = config.search if is_search else config.tune
    main = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(settings, main, prompt.parameters())
    predictor = make_predictor(context, prompt, network, cell.stage, config.backend).train()
    learner = Learner(predictor, _label_map(sizes), optimizer, follow_scores if is_search else lambda: None)
    return Loop(context, cell.stage, prompt.image_size, learner, densities)


def _build_published(arm: Arm, cell: Cell, sizes: Sizes, context: Context, network: nn.Module) -> Loop:
    dtype, is_compiled = getattr(torch, arm.dtype), arm.who == "torch.compile"
    canvas, frame = sizes.canvas, sizes.frame
    network = network.to(context.device)
    found = publish(network, cell.stage, cell.variant, canvas, frame, arm.density, dtype, is_compiled)
    follow = found.threshold.update if found.threshold is not None else lambda: None
    learner = Learner(found.predictor, _label_map(sizes), found.optimizer, follow)  # type: ignore[arg-type]
    image_size = canvas if cell.variant == "released" else canvas - 2 * frame
    return Loop(context, cell.stage, image_size, learner)


def start_scores(network: nn.Module, pattern: Pattern, start: str, seed: int) -> dict[str, Tensor]:
    """Scores of a plain network: those of the method, or such that every layer gets the density."""
    if start == "method":
        return find_method("vpns").start_scores(Start(network, None, pattern, seed))
    return unit_scores(network, pattern, _rank)


def _rank(weight: Tensor) -> Tensor:
    """Signed places of magnitudes within the layer, from 0 to 1: one threshold cuts all layers alike."""
    places = weight.abs().flatten().argsort().argsort().view_as(weight)
    return weight.sign() * (places + 0.5) / weight.numel()


def _label_map(sizes: Sizes) -> LabelMap:
    label_map = LabelMap(identity_map(sizes.source_classes, min(CLASSES, sizes.source_classes)))
    return label_map.to(sizes.device)
