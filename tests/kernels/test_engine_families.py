"""Does every classification family of torchvision give what torch gives, and which of them run whole?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vpns_kernels.engine import Engine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network
from vpns_kernels.torchvision_import import import_torchvision

# The name, and the side of the images.
WHOLE = {"resnet18": 64, "mobilenet_v2": 64, "squeezenet1_1": 64}
WHOLE_LONG = {
    "alexnet": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "googlenet": 64,
    "inception_v3": 299, "mnasnet0_5": 64, "mobilenet_v3_small": 64, "mobilenet_v3_large": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet50": 64, "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64, "vgg11": 64, "vgg16_bn": 64, "wide_resnet50_2": 64,
}  # fmt: skip
IN_PART_LONG = {"convnext_tiny": 64, "maxvit_t": 224, "swin_t": 64, "swin_v2_t": 64, "vit_b_32": 224}
OPTIONS = {
    "googlenet": {"init_weights": False, "transform_input": True},
    "inception_v3": {"init_weights": False, "transform_input": True},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(5)
    network: nn.Module = import_torchvision("models").get_model(name, weights=None, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(6)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # Half of the weights, and He's scale for what is left.
            fan = module.weight[0].numel() / 2
            kept = torch.rand(module.weight.shape, generator=generator) < 0.5
            module.weight.data = (
                torch.randn(module.weight.shape, generator=generator) * kept * (2 / fan) ** 0.5
            )
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return network.eval()


def check(name: str, size: int, is_whole: bool) -> None:
    network = build(name)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))
    steps = lower(trace_network(network, x))
    assert (not steps.programs) == is_whole
    with torch.no_grad():
        truth = copy.deepcopy(network).double()(x.double())
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(draft_plan(steps, dtype, {}, chunk=2), programs=steps.programs)
        with torch.no_grad():
            theirs = copy.deepcopy(network).to(dtype)(x.to(dtype)).double()
        bound = 2 * float((theirs - truth).abs().max())
        bound += 4 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((engine(x).double() - truth).abs().max()) <= bound, dtype


@pytest.mark.parametrize("name", WHOLE)
def test_networks_of_torchvision_run_whole(name: str) -> None:
    check(name, WHOLE[name], is_whole=True)


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE_LONG)
def test_more_networks_of_torchvision_run_whole(name: str) -> None:
    check(name, WHOLE_LONG[name], is_whole=True)


@pytest.mark.long
@pytest.mark.parametrize("name", IN_PART_LONG)
def test_other_networks_of_torchvision_run_in_part(name: str) -> None:
    check(name, IN_PART_LONG[name], is_whole=False)
