"""Stage pretrain: the network learns letters, or takes the weights it is given."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vpns.batches import Pass
from vpns.config import DataConfig, RunConfig
from vpns.data import load_data
from vpns.files import write_tensors
from vpns.label_map import LabelMap, check_enough
from vpns.models import build_model
from vpns.optimizers import build_optimizer, set_learning_rate
from vpns.predictor import Predictor
from vpns.stages.context import Context, Stage
from vpns.stages.loop import Training, train
from vpns.stages.networks import changing_tensors, plain_prompt
from vpns.step import Learner
from vpns_kernels.convert import mask_layers
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import parse_pattern


def run_pretrain(context: Context) -> dict[str, Any]:
    """Write the pretrained weights; later stages read them from here, wherever they came from."""
    config = context.config
    # Images that cannot be used are found here, before minutes of training.
    classes = len(context.images.class_names)
    if config.label_map.kind != "head":
        check_enough(config.model.source_classes, classes)
    network = build_model(config.model, config.model.source_classes, config.seed).to(context.device)
    _check_network(network, config.model.source_classes, config.prompt.canvas, context.device)
    # Masked once in vain, so that a network which the pattern does not fit is found here too.
    masked = mask_layers(copy.deepcopy(network), parse_pattern(config.pattern))
    if config.backend != "reference":
        _check_layers(masked)
    result: dict[str, Any] = {"source": config.model.weights}
    if learns_letters(config):
        result = {"source": "letters"} | _learn_letters(context, network)
    write_tensors(context.stage_folder("pretrain") / "weights.safetensors", network.state_dict())
    return result


PRETRAIN = Stage("pretrain", run_pretrain)


def learns_letters(config: RunConfig) -> bool:
    """Whether the network is taught them, as it has no weights and not only a random start."""
    return config.model.weights is None and config.pretrain.epochs > 0


def _learn_letters(context: Context, network: nn.Module) -> dict[str, Any]:
    config = context.config
    letters = load_data(DataConfig("letters", val_fraction=0.1), config.seed, config.prompt.canvas)
    optimizer = build_optimizer(config.pretrain, network.parameters())

    def begin_epoch(epoch: int) -> tuple[Pass, ...]:
        set_learning_rate(optimizer, config.pretrain.schedule, epoch, config.pretrain.epochs)
        return (Pass(prompted=False, augmented=True),) * config.pretrain.passes

    predictor = Predictor(plain_prompt(context), network)
    training = Training(
        stage="pretrain",
        settings=config.pretrain,
        learner=Learner(predictor, LabelMap(), optimizer, refresh=lambda: None, group=context.group),
        tensors=changing_tensors(("", network)),
        train=letters.train.to(context.device),
        val=letters.val.to(context.device),
        begin_epoch=begin_epoch,
        is_prompted=False,
    )
    return train(training, context)


def _check_layers(network: nn.Module) -> None:
    """Refuse a convolution that cannot be packed for the kernels."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            try:
                ConvGeometry.from_module(layer)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"pretrain: expected layers that the kernels take, got {name!r}: {error} "
                    "(backend=reference trains it by torch's dense layers)"
                ) from error


@torch.no_grad()
def _check_network(network: nn.Module, classes: int, canvas: int, device: torch.device) -> None:
    """Refuse at once what would fail later, in words that name the setting."""
    name = type(network).__name__
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        raise ValueError(f"pretrain: expected a model with convolutions, got {name} without any")
    network.eval()
    try:
        logits = network(torch.zeros(2, 3, canvas, canvas, device=device))
    except Exception as error:
        # A user's own forward may raise anything.
        raise ValueError(
            f"pretrain: expected a model that takes images [N, 3, {canvas}, {canvas}], got {name}: "
            f"{type(error).__name__}: {error} (prompt.canvas sets the size)"
        ) from error
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [2, classes]:
        raise ValueError(
            f"pretrain: expected logits [2, {classes}] of 2 images, got {shape} from {name} "
            "(model.source_classes sets the number)"
        )
