"""Stage search: mask scores and prompt are learned with frozen weights (paper section 3, stage 1).

Batch norm follows the batches (its running statistics move, its affine part does not), the mask follows the
scores after every update. A new head, where the label map asks for one, learns beside the scores: its random
weights would leave them nothing to find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from vpns.batches import Pass, derive_seed
from vpns.config import RunConfig
from vpns.files import write_tensors
from vpns.label_map import LabelMap
from vpns.masking import attach_masks, describe_masks, refresh
from vpns.methods import Start, find_method
from vpns.models import find_head
from vpns.optimizers import build_optimizer, set_learning_rate
from vpns.prompt import Prompt
from vpns.stages.check import compare_training
from vpns.stages.context import Context, Stage
from vpns.stages.loop import Training, train
from vpns.stages.networks import (
    changing_tensors,
    find_label_map,
    is_prompted_at_inference,
    label_map_to_list,
    load_start,
    load_trained,
    make_predictor,
    make_prompt,
    stage_passes,
)
from vpns.step import Learner
from vpns_kernels.convert import mask_modules
from vpns_kernels.patterns import parse_pattern
from vpns_kernels.refresh import Refresh


def run_search(context: Context) -> dict[str, Any]:
    """Write masks, scores, prompt, and what else of the network moved."""
    config = context.config
    network = _start_network(context)
    # All that learns, before a schedule's first half lets some of it rest.
    changing = changing_tensors(("", network))
    follow_scores = _refresher(config, network)
    first = follow_scores().masks
    prompt = make_prompt(context)
    label_map = _count_label_map(context, network, prompt, epoch=0)
    result: dict[str, Any] = {}
    if find_method(config.method).learns_scores:
        if context.checks:
            ours, theirs = (copy.deepcopy((network, prompt)) for _ in range(2))
            reference = _plan(context, *theirs, label_map, "reference")
            compare_training(_plan(context, *ours, label_map, config.backend), reference, context)
        result |= train(_plan(context, network, prompt, label_map, config.backend), context)
    chosen = follow_scores()
    layers = describe_masks(network)
    _write(context, network, prompt, changing)
    return result | {
        "label_map": label_map_to_list(label_map),
        "density": config.density,
        "weight_density": sum(row["kept"] for row in layers) / sum(row["weights"] for row in layers),
        "threshold": chosen.threshold,
        "ties_kept": chosen.ties_kept,
        "kept": chosen.kept,
        "mask_changed_frac": _changed_frac(first, chosen.masks),
        "layers": layers,
    }


SEARCH = Stage("search", run_search, needs=("pretrain",))


@dataclass(frozen=True)
class Phase:
    """What an epoch of search trains, and where in its phase it is.

    Args:
        is_prompted: whether prompted passes carry the prompt yet.
    """

    trains_scores: bool
    trains_prompt: bool
    is_prompted: bool
    epoch: int
    epochs: int


def find_phase(schedule: str, epoch: int, epochs: int) -> Phase:
    """Jointly, or the first half of the epochs one and the rest the other; each half has a whole schedule.

    Until its mask is found, "mask_then_prompt" shows no prompt; "prompt_then_mask" keeps its prompt as found.
    """
    if schedule == "joint":
        return Phase(True, True, True, epoch, epochs)
    half = epochs // 2
    is_first = epoch < half
    trains_scores = is_first == (schedule == "mask_then_prompt")
    is_prompted = not (is_first and schedule == "mask_then_prompt")
    place = (epoch, half) if is_first else (epoch - half, epochs - half)
    return Phase(trains_scores, not trains_scores, is_prompted, *place)


def _start_network(context: Context) -> nn.Module:
    """Masked, with the method's start scores; of its own parameters only a new head learns."""
    config = context.config
    method, pattern = find_method(config.method), parse_pattern(config.pattern)
    start = Start(
        pretrained=load_start(context),
        fine_tuned=load_trained(context, "dense") if method.needs_fine_tuned else None,
        pattern=pattern,
        seed=derive_seed(config.seed, "scores"),
    )
    scores = method.start_scores(start)
    network = attach_masks(start.pretrained, pattern, scores).to(context.device)
    if config.label_map.kind == "head":
        _, head = find_head(network)
        head.weight.requires_grad_(True)
        if head.bias is not None:
            head.bias.requires_grad_(True)
    return network


def _changed_frac(before: list[Tensor], after: list[Tensor]) -> float:
    """Share of the mask's entries that search turned over."""
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(mask.numel() for mask in before)


def _refresher(config: RunConfig, network: nn.Module) -> Callable[[], Refresh]:
    pattern = parse_pattern(config.pattern)
    rule: Literal["exact", "published"] = "published" if config.prompt.variant == "released" else "exact"
    return lambda: refresh(network, pattern, config.density, rule)


def _plan(
    context: Context, network: nn.Module, prompt: Prompt, label_map: LabelMap, backend: str
) -> Training:
    config = context.config
    passes = stage_passes(config, "search")
    main = [parameter for parameter in network.parameters() if parameter.requires_grad]
    learned = [parameter for parameter in prompt.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.search, main, learned)
    predictor = make_predictor(context, prompt, network, "search", backend)

    def begin_epoch(epoch: int) -> tuple[Pass, ...]:
        phase = find_phase(config.schedule, epoch, config.search.epochs)
        set_learning_rate(optimizer, config.search.schedule, phase.epoch, phase.epochs)
        for parameters, trains in ((main, phase.trains_scores), (learned, phase.trains_prompt)):
            for parameter in parameters:
                parameter.requires_grad_(trains)
        # A plain batch teaches a prompt nothing.
        used = passes if phase.trains_scores else passes[:1]
        return tuple(replace(one, prompted=one.prompted and phase.is_prompted) for one in used)

    is_iterative = config.label_map.kind == "iterative"

    def follow(epoch: int) -> None:
        # Before the first epoch it has just been counted.
        if is_iterative and epoch > 0 and label_map.sequence is not None:
            found = _count_label_map(context, network, prompt, epoch).sequence
            assert found is not None
            label_map.sequence.copy_(found)

    return Training(
        stage="search",
        settings=config.search,
        learner=Learner(
            predictor, label_map, optimizer, refresh=_refresher(config, network), group=context.group
        ),
        tensors=changing_tensors(
            ("network.", network), ("prompt.", prompt), *([("label_map.", label_map)] if is_iterative else [])
        ),
        train=context.images.train.to(context.device),
        val=context.images.val.to(context.device),
        begin_epoch=begin_epoch,
        is_prompted=is_prompted_at_inference(config),
        follow=follow,
    )


def _count_label_map(context: Context, network: nn.Module, prompt: Prompt, epoch: int) -> LabelMap:
    """On images as the epoch's scores see them."""
    config = context.config
    is_prompted = find_phase(config.schedule, epoch, config.search.epochs).is_prompted
    return find_label_map(context, network, prompt, "search", epoch, is_prompted)


def _write(context: Context, network: nn.Module, prompt: Prompt, changing: dict[str, Tensor]) -> None:
    folder, masked = context.stage_folder("search"), mask_modules(network)
    write_tensors(folder / "masks.safetensors", {name: m.mask for name, m in masked.items()})
    write_tensors(folder / "scores.safetensors", {name: m.scores for name, m in masked.items()})
    write_tensors(folder / "prompt.safetensors", prompt.state_dict())
    own = [f"{name}.{what}" for name in masked for what in ("scores", "mask")]
    moved = {name: tensor for name, tensor in changing.items() if name not in own}
    write_tensors(folder / "network.safetensors", moved)
