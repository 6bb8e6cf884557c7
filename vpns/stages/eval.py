"""Stage eval: the test split is touched, once; every image's logits are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vpns.batches import iterate_split
from vpns.files import write_tensors
from vpns.label_map import LabelMap
from vpns.predictor import Predictor
from vpns.prompt import Prompt
from vpns.stages.context import Context, Stage
from vpns.stages.networks import effective_prompt, label_map_from_list, load_trained, plain_prompt
from vpns.stages.pruned import load_pruned
from vpns.step import predict_logits


def run_eval(context: Context) -> dict[str, Any]:
    """Write logits of the task's classes for each test image: dense, sparse without and with the prompt."""
    pruned, dense = load_pruned(context), load_trained(context, "dense").eval()
    dense_map = label_map_from_list(context.finished["dense"].result["label_map"]).to(context.device)
    test = context.images.test.to(context.device)

    def logits_of(network: nn.Module, prompt: Prompt, label_map: LabelMap, prompted: bool) -> Tensor:
        batches = iterate_split(test, prompt.image_size, prompted)
        return predict_logits(Predictor(prompt, network), label_map, batches)

    outputs = {
        "dense_logits": logits_of(dense, plain_prompt(context), dense_map, False),
        "logits": logits_of(pruned.network, pruned.prompt, pruned.label_map, False),
    }
    has_prompt = effective_prompt(context.config).kind != "none"
    if has_prompt:
        outputs["logits_prompted"] = logits_of(pruned.network, pruned.prompt, pruned.label_map, True)
    write_tensors(context.stage_folder("eval") / "outputs.safetensors", outputs | {"labels": test.labels})
    accuracy = {
        name: 100 * float((logits.argmax(1) == test.labels).double().mean())
        for name, logits in outputs.items()
    }
    own = "logits_prompted" if has_prompt and pruned.is_prompted else "logits"
    return {
        "dense_accuracy": accuracy["dense_logits"],
        "sparse_accuracy": accuracy["logits"],
        "sparse_accuracy_prompted": accuracy.get("logits_prompted"),
        "accuracy": accuracy[own],
        "is_prompted": own == "logits_prompted",
        "test_images": len(test),
        "class_names": list(context.images.class_names),
    }


EVAL = Stage("eval", run_eval, needs=("dense", "search", "tune"))
