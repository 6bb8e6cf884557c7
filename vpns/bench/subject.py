"""Which network is to be measured? Built by name, or opened from what a run or an export has left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vpns.config import ModelConfig, PromptConfig
from vpns.inference import Inference
from vpns.models import build_model, find_head, load_exactly, replace_head
from vpns.prompt import build_prompt
from vpns.run import open_finished
from vpns.stages.networks import label_map_from_list
from vpns.stages.pruned import load_pruned
from vpns_kernels.engine import Engine, load, read_artifact
from vpns_kernels.measure.random_network import is_pruned

_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class BenchSubject:
    """A network in evaluation mode.

    Args:
        name: as reports call it.
        is_pruned: whether it has zeros of its own, and takes no random masks.
        pattern: of its mask, where that is known.
        density: of that pattern's units.
        size: of the images that it was made for, where that is known.
        engine: that runs it as it is deployed, where there is one: it takes images of that size alone.
    """

    name: str
    network: nn.Module
    is_pruned: bool
    pattern: str | None = None
    density: float | None = None
    size: int | None = None
    engine: Engine | None = None


def load_subject(name: str, device: torch.device | str = "cpu") -> BenchSubject:
    """The network of a run's folder, of an artifact's, or of a name.

    Args:
        device: of the engine, where there is one.

    Raises:
        ValueError: a name that nobody knows, or an artifact without weights.
    """
    folder = Path(name)
    if (folder / "run.json").is_file():
        return _from_run(folder)
    if (folder / "manifest.json").is_file():
        return _from_artifact(folder, device)
    network = build_model(ModelConfig(name), _CLASSES, seed=0)
    return BenchSubject(name, network.eval(), is_pruned(network))


def _from_run(folder: Path) -> BenchSubject:
    context = open_finished(folder)
    if "tune" not in context.finished:
        raise ValueError(f"bench: expected a run that has tuned, got {folder} (vpns tune {folder})")
    config = context.config
    network = load_pruned(context).network.cpu()
    size = config.prompt.canvas
    return BenchSubject(config.model.name, network, True, config.pattern, config.density, size)


def _from_artifact(folder: Path, device: torch.device | str) -> BenchSubject:
    artifact = read_artifact(folder)
    manifest, weights = artifact.manifest, artifact.weights
    if weights is None or not isinstance(manifest.get("model"), dict):
        raise ValueError(
            f"bench: expected an artifact with its model and weights, got {folder} "
            "(dense engines have nothing to run; name the model, or a run's own export)"
        )
    model = ModelConfig(**{**manifest["model"], "weights": None})
    network = _fit_head(build_model(model, model.source_classes, seed=0), weights)
    load_exactly(network, weights)
    pattern, density = manifest.get("pattern"), manifest.get("density")
    prompt, settings = artifact.prompt, dict(manifest.get("prompt") or {})
    is_prompted = bool(settings.pop("at_inference", False))
    if manifest.get("kind") != "engine" or prompt is None:
        return BenchSubject(model.name, network.eval(), True, pattern, density, settings.get("canvas"))
    made = build_prompt(PromptConfig(**settings))
    made.load_state_dict(prompt)
    whole = Inference(made, network, is_prompted, label_map_from_list(manifest.get("label_map")))
    engine = load(folder, device=device)
    return BenchSubject(model.name, whole, True, pattern, density, made.image_size, engine)


def _fit_head(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """With as many classes as the weights have: a run may have put a head of its own."""
    if not any(isinstance(module, nn.Linear) for module in network.modules()):
        return network
    name, head = find_head(network)
    found = weights.get(f"{name}.weight".removeprefix("."))
    return (
        network if found is None or len(found) == len(head.weight) else replace_head(network, len(found), 0)
    )
