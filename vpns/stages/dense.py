"""Stage dense: the pretrained network is fine-tuned unpruned, on the budget of tune: the reference."""

from __future__ import annotations

from typing import Any

from vpns.batches import Pass
from vpns.files import write_tensors
from vpns.optimizers import build_optimizer, set_learning_rate
from vpns.predictor import Predictor
from vpns.stages.context import Context, Stage
from vpns.stages.loop import Training, train
from vpns.stages.networks import (
    changing_tensors,
    find_label_map,
    label_map_to_list,
    load_start,
    plain_prompt,
    stage_passes,
)
from vpns.step import Learner


def run_dense(context: Context) -> dict[str, Any]:
    """Train on plain images of the whole canvas, as many updates as tune makes."""
    config = context.config
    network, prompt = load_start(context), plain_prompt(context)
    label_map = find_label_map(context, network, prompt, "dense")
    optimizer = build_optimizer(config.tune, network.parameters())

    def begin_epoch(epoch: int) -> tuple[Pass, ...]:
        set_learning_rate(optimizer, config.tune.schedule, epoch, config.tune.epochs)
        return (Pass(prompted=False, augmented=True),) * len(stage_passes(config, "tune"))

    training = Training(
        stage="dense",
        settings=config.tune,
        learner=Learner(
            Predictor(prompt, network), label_map, optimizer, refresh=lambda: None, group=context.group
        ),
        tensors=changing_tensors(("", network)),
        train=context.images.train.to(context.device),
        val=context.images.val.to(context.device),
        begin_epoch=begin_epoch,
        is_prompted=False,
    )
    result = train(training, context)
    write_tensors(context.stage_folder("dense") / "weights.safetensors", network.state_dict())
    return result | {"label_map": label_map_to_list(label_map)}


DENSE = Stage("dense", run_dense, needs=("pretrain",))
