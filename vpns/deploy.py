"""How does a finished run leave the trainer? Packed as an artifact, and measured against its dense self."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpns.batches import iterate_split
from vpns.config import RunConfig
from vpns.files import write_tensors
from vpns.run import open_finished
from vpns.stages.context import Context
from vpns.stages.networks import effective_prompt, label_map_to_list
from vpns.stages.pruned import Pruned, load_pruned
from vpns_kernels import ConvGeometry, pack, parse_pattern
from vpns_kernels.convert import mask_layers, mask_modules, weight_masks
from vpns_kernels.engine import PlanLayer, read_artifact, write_artifact
from vpns_kernels.formats import holding_pattern
from vpns_kernels.measure import bench_network, fingerprint, measurement_lock
from vpns_kernels.patterns import Pattern

# Beside the run's own canvas, the size at which the field reports times.
_COMMON_SIZE = 224
_BENCH_BATCH = 16


def export_run(folder: Path, config: RunConfig) -> None:
    """Write export/artifact, and the prompt beside it; compare what is read back with what was written.

    Raises:
        RuntimeError: the artifact does not give back the pruned weights (a defect, or a failing disk).
    """
    context = open_finished(folder)
    pruned, pattern = load_pruned(context), parse_pattern(config.pattern)
    masks = _weight_masks(pruned, pattern)
    target = context.stage_folder("export") / "artifact"
    layers = [_plan_layer(name, pruned.network, mask, pattern) for name, mask in masks.items()]
    write_artifact(target, _describe(context, pruned), layers, masks, pruned.network.state_dict())
    write_tensors(context.stage_folder("export") / "prompt.safetensors", pruned.prompt.state_dict())
    stored = read_artifact(target, verify="all").weights
    assert stored is not None
    for name, tensor in pruned.network.state_dict().items():
        if not torch.equal(stored[name], tensor):
            raise RuntimeError(f"export: expected {target} to hold {name} as tuned, got other values")


def bench_run(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Time the pruned network against dense, at the own canvas and at 224 pixels, on 16 validation images."""
    context = open_finished(folder)
    pruned, pattern = load_pruned(context), parse_pattern(config.pattern)
    masks = _weight_masks(pruned, pattern)
    own = _network_input(context, pruned)
    common = nn.functional.interpolate(own, size=(_COMMON_SIZE, _COMMON_SIZE), mode="nearest")
    inputs = [own] if own.shape[-1] == _COMMON_SIZE else [own, common]
    with measurement_lock():
        networks = [bench_network(pruned.network, masks, pattern, x) for x in inputs]
    return {"machine": fingerprint(), "networks": networks}


def _weight_masks(pruned: Pruned, pattern: Pattern) -> dict[str, Tensor]:
    masked = mask_layers(copy.deepcopy(pruned.network), pattern)
    for name, module in mask_modules(masked).items():
        module.mask.copy_(pruned.masks[name])
    return weight_masks(masked)


def _plan_layer(name: str, network: nn.Module, mask: Tensor, pattern: Pattern) -> PlanLayer:
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    geometry = ConvGeometry.from_module(layer)
    packed = pack(layer.weight, mask, holding_pattern(pattern, geometry), geometry)
    bias = None if layer.bias is None else layer.bias.detach()
    return PlanLayer(name, "conv2d" if isinstance(layer, nn.Conv2d) else "linear", packed, bias)


def _describe(context: Context, pruned: Pruned) -> dict[str, Any]:
    config, search = context.config, context.finished["search"].result
    return {
        "model": asdict(config.model),
        "prompt": asdict(effective_prompt(config)) | {"at_inference": pruned.is_prompted},
        "label_map": label_map_to_list(pruned.label_map),
        "class_names": list(context.images.class_names),
        "method": config.method,
        "pattern": config.pattern,
        "density": config.density,
        "threshold": search["threshold"],
        "ties_kept": search["ties_kept"],
        "made_with": fingerprint(),
    }


def _network_input(context: Context, pruned: Pruned) -> Tensor:
    """What the network sees of the first validation images, repeated to a whole batch."""
    val = context.images.val.to(context.device)
    (batch, *_) = iterate_split(val, pruned.prompt.image_size, pruned.is_prompted)
    with torch.no_grad():
        x: Tensor = pruned.prompt(batch.images, batch.prompted)
    return x.repeat(-(-_BENCH_BATCH // len(x)), 1, 1, 1)[:_BENCH_BATCH].cpu()
