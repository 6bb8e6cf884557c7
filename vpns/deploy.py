"""How does a finished run leave the trainer? As a CPU's engine, and measured against its dense self."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpns.batches import iterate_split
from vpns.config import RunConfig
from vpns.files import write_tensors
from vpns.inference import Inference
from vpns.run import open_finished
from vpns.stages.context import Context
from vpns.stages.networks import effective_prompt, label_map_to_list
from vpns.stages.pruned import Pruned, load_pruned
from vpns_kernels import ConvGeometry, compile, load, pack, parse_pattern
from vpns_kernels.convert import mask_layers, mask_modules, weight_masks
from vpns_kernels.engine import PlanLayer, TraceError, read_artifact, save_engine, write_artifact
from vpns_kernels.formats import holding_pattern
from vpns_kernels.measure import bench_network, fingerprint, measurement_lock
from vpns_kernels.measure.gpu import gpu_fingerprint
from vpns_kernels.measure.on_gpu import find_gpu
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.shrink import shrink

# Beside the run's own canvas, the size at which the field reports times.
_COMMON_SIZE = 224
_BENCH_BATCH = 16
# Of the largest logit: inside an engine activations may be bfloat16.
_LARGEST_ERROR = 0.1


def export_run(folder: Path, config: RunConfig) -> None:
    """Write export/artifact, and the prompt beside it; compare what is read back with what was written.

    The artifact is an engine: images in [0, 1] → logits of the task's classes, prompt and label map included.
    A network that cannot be traced is stored as its packed layers alone, and the manifest says why.

    Raises:
        RuntimeError: the artifact does not give back the pruned weights, or the run's logits (a defect, or a
            failing disk).
    """
    context = open_finished(folder)
    pruned, pattern = load_pruned(context).cpu(), parse_pattern(config.pattern)
    masks = _weight_masks(pruned, pattern)
    target = context.stage_folder("export") / "artifact"
    described, weights = _describe(context, pruned), pruned.network.state_dict()
    prompt = pruned.prompt.state_dict()
    images = first_images(context, pruned, _BENCH_BATCH)
    try:
        smaller = shrink(pruned.network) if isinstance(pattern, Channel) else pruned.network
        engine = compile(_inference(pruned, smaller), images)
    except TraceError as error:
        print(f"vpns: export: packed layers alone: {error}", file=sys.stderr)
        layers = [_plan_layer(name, pruned.network, mask, pattern) for name, mask in masks.items()]
        described |= {"kind": "layers", "why_not_an_engine": str(error)}
        write_artifact(target, described, layers, masks, weights, prompt=prompt)
    else:
        save_engine(engine, target, described, masks, weights, prompt)
        expected = _inference(pruned, pruned.network)(images)
        check_logits(target, load(target)(images), expected, _LARGEST_ERROR)
    write_tensors(context.stage_folder("export") / "prompt.safetensors", prompt)
    stored = read_artifact(target, verify="all").weights
    assert stored is not None
    for name, tensor in weights.items():
        if not torch.equal(stored[name], tensor):
            raise RuntimeError(f"export: expected {target} to hold {name} as tuned, got other values")


def bench_run(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Time the pruned network against dense, at the own canvas and at 224 pixels, on 16 validation images.

    Where the run's device is a GPU, there too: the last of the networks.

    Raises:
        ValueError: a GPU that is not there.
    """
    is_on_cpu = torch.device(config.device).type == "cpu"
    device = torch.device("cpu") if is_on_cpu else find_gpu(config.device)
    context = open_finished(folder)
    pruned, pattern = load_pruned(context).cpu(), parse_pattern(config.pattern)
    own = _network_input(context, pruned)
    common = nn.functional.interpolate(own, size=(_COMMON_SIZE, _COMMON_SIZE), mode="nearest")
    inputs = [own] if own.shape[-1] == _COMMON_SIZE else [own, common]
    with measurement_lock():
        devices = [torch.device("cpu")] if is_on_cpu else [torch.device("cpu"), device]
        networks = [bench_network(pruned.network, pattern, x.to(d)) for d in devices for x in inputs]
    machine = fingerprint() if is_on_cpu else gpu_fingerprint(device)
    return {"machine": machine, "networks": networks}


def _inference(pruned: Pruned, network: nn.Module) -> nn.Module:
    return Inference(pruned.prompt, network, pruned.is_prompted, pruned.label_map)


def check_logits(target: Path, found: Tensor, expected: Tensor, largest_error: float) -> None:
    """Refuse a file whose logits are further off than this share of the largest."""
    error = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    if not error <= largest_error:
        found_error = f"got some off by {error:.2g} of the largest"
        raise RuntimeError(f"export: expected {target} to compute the run's logits, {found_error}")


def first_images(context: Context, pruned: Pruned, count: int) -> Tensor:
    """So many validation images in [0, 1], repeated where there are fewer."""
    val = context.images.val.to(context.device)
    (batch, *_) = iterate_split(val, pruned.prompt.image_size, pruned.is_prompted)
    images = batch.images
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count].cpu()


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
    """What the network sees of the first validation images."""
    with torch.no_grad():
        x: Tensor = pruned.prompt(first_images(context, pruned, _BENCH_BATCH), pruned.is_prompted)
    return x
