"""Stage tune: the kept weights and the prompt are trained with the mask fixed (paper section 3, stage 2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vpns.batches import Pass
from vpns.files import read_tensors, write_tensors
from vpns.masking import attach_masks
from vpns.models import load_exactly
from vpns.optimizers import build_optimizer, set_learning_rate
from vpns.prompt import Prompt
from vpns.stages.check import compare_training
from vpns.stages.context import Context, Stage
from vpns.stages.loop import Training, train
from vpns.stages.networks import (
    changing_tensors,
    is_prompted_at_inference,
    label_map_from_list,
    load_start,
    make_predictor,
    make_prompt,
    stage_passes,
)
from vpns.step import Learner
from vpns_kernels.convert import densify, freeze, mask_modules, sparsify, weight_masks
from vpns_kernels.patterns import parse_pattern


def run_tune(context: Context) -> dict[str, Any]:
    """Write the pruned network as a plain state dict with zeros in place, its masks and its prompt."""
    config, folder = context.config, context.stage_folder("tune")
    masked = _load_found(context)
    prompt = make_prompt(context, read_tensors(context.stage_folder("search") / "prompt.safetensors"))
    if context.checks:
        ours, theirs = (copy.deepcopy((masked, prompt)) for _ in range(2))
        reference = _plan(context, *theirs, "reference")
        compare_training(_plan(context, *ours, config.backend), reference, context)
    training = _plan(context, masked, prompt, config.backend)
    result = train(training, context)
    network = training.learner.predictor.network
    plain = freeze(network) if network is masked else densify(network)
    write_tensors(folder / "weights.safetensors", plain.state_dict())
    write_tensors(folder / "masks.safetensors", {n: m.mask for n, m in mask_modules(masked).items()})
    write_tensors(folder / "prompt.safetensors", prompt.state_dict())
    return result


TUNE = Stage("tune", run_tune, needs=("search",))


def _plan(context: Context, masked: nn.Module, prompt: Prompt, backend: str) -> Training:
    """With packed weights, but for the reference, which multiplies dense ones by their masks."""
    config = context.config
    network = masked if backend == "reference" else _pack(masked, config.pattern)
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.tune, weights, prompt.parameters())

    def begin_epoch(epoch: int) -> tuple[Pass, ...]:
        set_learning_rate(optimizer, config.tune.schedule, epoch, config.tune.epochs)
        return stage_passes(config, "tune")

    predictor = make_predictor(context, prompt, network, "tune", backend)
    label_map = label_map_from_list(context.finished["search"].result["label_map"]).to(context.device)
    return Training(
        stage="tune",
        settings=config.tune,
        learner=Learner(predictor, label_map, optimizer, refresh=lambda: None, group=context.group),
        tensors=changing_tensors(("network.", network), ("prompt.", prompt)),
        train=context.images.train.to(context.device),
        val=context.images.val.to(context.device),
        begin_epoch=begin_epoch,
        is_prompted=is_prompted_at_inference(config),
    )


def _pack(masked: nn.Module, pattern: str) -> nn.Module:
    """The same network with packed weights: what is masked takes neither memory nor time."""
    packed = sparsify(freeze(masked), weight_masks(masked), parse_pattern(pattern))
    return packed.requires_grad_(True)


def _load_found(context: Context) -> nn.Module:
    """The masked network as search left it; all of it learns but scores and masks."""
    folder = context.stage_folder("search")
    scores, masks = (read_tensors(folder / f"{name}.safetensors") for name in ("scores", "masks"))
    network = attach_masks(load_start(context), parse_pattern(context.config.pattern), scores)
    network.to(context.device)
    network.requires_grad_(True)
    with torch.no_grad():
        for name, module in mask_modules(network).items():
            module.mask.copy_(masks[name])
            module.scores.requires_grad_(False)
    load_exactly(network, read_tensors(folder / "network.safetensors"), strict=False)
    return network
