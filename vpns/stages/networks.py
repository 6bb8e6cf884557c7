"""Which network does a stage begin with? Plain, on the run's device, with an earlier stage's weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vpns.accelerate import choose_backends, fuse_predictor, set_backends
from vpns.batches import Pass, derive_seed, iterate_epoch
from vpns.config import PromptConfig, RunConfig
from vpns.files import read_json, read_tensors, write_json
from vpns.label_map import LabelMap, count_predictions, frequency_map, identity_map
from vpns.methods import find_method
from vpns.models import build_model, load_exactly, replace_head
from vpns.predictor import Predictor
from vpns.prompt import Prompt, build_prompt
from vpns.stages.context import Context
from vpns.state import SCHEMA_VERSION
from vpns_kernels.sparse_modules import layout_names

# Images of a batch by which a label map is counted; each draws its augmentation: others give other maps.
_COUNTED_AT_ONCE = 256


def load_source(context: Context) -> nn.Module:
    """The network as pretrained, with its own head."""
    config = context.config
    network = build_model(replace(config.model, weights=None), config.model.source_classes, config.seed)
    load_exactly(network, read_tensors(context.stage_folder("pretrain") / "weights.safetensors"))
    return network


def load_start(context: Context) -> nn.Module:
    """The pretrained network as the task begins with it: where the label map is a new head, it has one."""
    return _fit_head(context, load_source(context))


def load_trained(context: Context, stage: str) -> nn.Module:
    """The plain network that "dense" or "tune" ended with; zeros where weights are pruned."""
    config = context.config
    network = build_model(replace(config.model, weights=None), config.model.source_classes, config.seed)
    network = _fit_head(context, network)
    load_exactly(network, read_tensors(context.stage_folder(stage) / "weights.safetensors"))
    return network


def effective_prompt(config: RunConfig) -> PromptConfig:
    """The prompt's settings as the method uses them: without a prompt, images fill the canvas."""
    is_prompted = find_method(config.method).is_prompted
    return config.prompt if is_prompted else replace(config.prompt, kind="none")


def make_prompt(context: Context, tensors: dict[str, Tensor] | None = None) -> Prompt:
    """The run's prompt, at its start or with an earlier stage's values."""
    prompt = build_prompt(effective_prompt(context.config))
    if tensors is not None:
        prompt.load_state_dict(tensors)
    return prompt.to(context.device)


def make_predictor(
    context: Context, prompt: Prompt, network: nn.Module, stage: str, backend: str
) -> Predictor:
    """The predictor of search or tune; what computes it stands in choice.json before the first update."""
    config = context.config
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    predictor = Predictor(prompt, network, dtype)
    if backend == "reference":
        set_backends(network, "reference")
        return predictor
    fused, done = fuse_predictor(predictor, config.density)
    path = context.stage_folder(stage) / "choice.json"
    device = context.device.type
    if not path.exists() or read_json(path)["device"] != device:
        settings = config.search if stage == "search" else config.tune
        count = -(-min(settings.batch_size, len(context.images.train)) // settings.accumulate)
        images = torch.zeros(count, 3, prompt.image_size, prompt.image_size, device=context.device)
        layers = choose_backends(predictor, images)
        content = {"device": device, "fused": done, "layers": layers}
        write_json(path, {"schema_version": SCHEMA_VERSION} | content)
    set_backends(network, read_json(path)["layers"])
    return fused


def plain_prompt(context: Context) -> Prompt:
    """Images on the whole canvas, normalised."""
    return build_prompt(replace(context.config.prompt, kind="none")).to(context.device)


def stage_passes(config: RunConfig, stage: str) -> tuple[Pass, ...]:
    """The updates of one iteration of search or tune.

    Released, as published: a prompted batch as at test time, then a plain augmented one. Framed: a prompted
    augmented batch, and a plain augmented one if the stage asks for two passes.
    """
    is_prompted = config.prompt.prompt_in in ("both", stage)
    plain = Pass(prompted=False, augmented=True)
    if config.prompt.variant == "released":
        return Pass(is_prompted, augmented=False), plain
    settings = config.search if stage == "search" else config.tune
    return (Pass(is_prompted, augmented=True), plain)[: settings.passes]


def is_prompted_at_inference(config: RunConfig) -> bool:
    """Whether the run's own accuracy is the one with the prompt."""
    if config.prompt.at_inference is not None:
        return config.prompt.at_inference
    return config.prompt.variant == "framed" and config.prompt.prompt_in in ("both", "tune")


def find_label_map(
    context: Context,
    network: nn.Module,
    prompt: Prompt,
    stage: str,
    epoch: int = 0,
    is_prompted: bool = True,
) -> LabelMap:
    """The run's label map for a network as it stands, counted on augmented training images as published.

    Args:
        epoch: of the stage, before which it is counted.
        is_prompted: whether the stage's prompted passes carry the prompt at that epoch.
    """
    config, classes = context.config, len(context.images.class_names)
    if config.label_map.kind == "head":
        return LabelMap()
    if config.label_map.kind == "identity":
        return LabelMap(identity_map(config.model.source_classes, classes)).to(context.device)
    is_prompted = is_prompted and stage_passes(config, stage)[0].prompted
    batches = iterate_epoch(
        context.images.train,
        (Pass(is_prompted, augmented=True),),
        (f"{stage}/label_map", epoch, 0),
        _COUNTED_AT_ONCE,
        prompt.image_size,
        config.data,
        config.seed,
    )
    inputs = ((prompt(batch.images, batch.prompted), batch.labels) for (batch,) in batches)
    was_training = prompt.training
    # A prompt that moves in training stands still: the map must not depend on where a run was resumed.
    prompt.eval()
    try:
        counts = count_predictions(network, inputs, classes)
    finally:
        prompt.train(was_training)
    return LabelMap(frequency_map(counts)).to(context.device)


def label_map_to_list(label_map: LabelMap) -> list[int] | None:
    """The label map as a stage's record holds it; None for the identity."""
    return None if label_map.sequence is None else [int(source) for source in label_map.sequence]


def label_map_from_list(sequence: list[int] | None) -> LabelMap:
    """The inverse of label_map_to_list."""
    return LabelMap(None if sequence is None else torch.tensor(sequence))


def changing_tensors(*modules: tuple[str, nn.Module]) -> dict[str, Tensor]:
    """What training may change, live, by prefixed name: parameters that learn, and buffers."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules:
        tensors |= {f"{prefix}{n}": p for n, p in module.named_parameters() if p.requires_grad}
        changing = module.state_dict(keep_vars=True).keys() - layout_names(module)
        tensors |= {f"{prefix}{n}": b for n, b in module.named_buffers() if n in changing}
    return tensors


def _fit_head(context: Context, network: nn.Module) -> nn.Module:
    if context.config.label_map.kind != "head":
        return network.to(context.device)
    seed = derive_seed(context.config.seed, "head")
    return replace_head(network, len(context.images.class_names), seed).to(context.device)
