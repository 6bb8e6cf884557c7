"""Is the layer found at which a network's arithmetic stops being finite?"""

from __future__ import annotations

from types import ModuleType

import torch

from vpns.accelerate import fuse_predictor
from vpns.batches import Batch
from vpns.config import PromptConfig
from vpns.nonfinite import locate_nonfinite
from vpns.predictor import Predictor
from vpns.prompt import build_prompt


def make_batch() -> Batch:
    return Batch(torch.rand(4, 3, 12, 12), torch.arange(4), True)


def make_predictor(tiny_task: ModuleType, fused: bool) -> Predictor:
    torch.manual_seed(0)
    plain = Predictor(build_prompt(PromptConfig(canvas=16, frame=2)), tiny_task.build(12))
    return fuse_predictor(plain)[0] if fused else plain


def test_a_tensor_that_is_not_finite_is_named(tiny_task: ModuleType) -> None:
    predictor = make_predictor(tiny_task, fused=False)
    with torch.no_grad():
        predictor.network.get_parameter("conv2.weight")[0, 0, 0, 0] = float("nan")
    assert locate_nonfinite(predictor, [make_batch()]) == "conv2.weight is not finite"


def test_the_first_output_that_overflows_is_named_by_its_layer(tiny_task: ModuleType) -> None:
    for fused in (False, True):
        predictor = make_predictor(tiny_task, fused)
        with torch.no_grad():
            predictor.network.get_parameter("bn1.weight").fill_(3e38)
        found = locate_nonfinite(predictor, [make_batch()])
        assert found == "the first output that is not finite is that of bn1", fused


def test_a_sound_network_is_said_to_be_sound(tiny_task: ModuleType) -> None:
    predictor = make_predictor(tiny_task, fused=True)
    assert locate_nonfinite(predictor, [make_batch()]) == "all layers are finite"
    assert not any(module._forward_hooks for module in predictor.modules())
