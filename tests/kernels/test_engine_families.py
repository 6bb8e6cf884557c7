"""Do networks as torchvision builds them run whole, and give what torch gives?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vpns_kernels.engine import Engine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network
from vpns_kernels.torchvision_import import import_torchvision

WHOLE = ("resnet18", "mobilenet_v2")
WHOLE_LONG = (
    *("resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg11", "vgg16_bn", "densenet121", "alexnet"),
    *("googlenet", "inception_v3", "mnasnet0_5", "squeezenet1_1"),
)
SIZES = {"inception_v3": 299}


def build(name: str) -> nn.Module:
    torch.manual_seed(5)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = import_torchvision("models").get_model(name, weights=None, **options)
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


def check(name: str) -> None:
    network = build(name)
    x = torch.randn(
        3, 3, SIZES.get(name, 64), SIZES.get(name, 64), generator=torch.Generator().manual_seed(7)
    )
    engine = Engine(draft_plan(lower(trace_network(network, x)), torch.float32, {}, chunk=2))
    with torch.no_grad():
        theirs = network(x)
        truth = network.double()(x.double())
    bound = 2 * float((theirs - truth).abs().max()) + 1e-5 * float(truth.abs().max())
    assert float((engine(x) - truth).abs().max()) <= bound


@pytest.mark.parametrize("name", WHOLE)
def test_torchvisions_networks_run_whole(name: str) -> None:
    check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE_LONG)
def test_more_of_torchvisions_networks_run_whole(name: str) -> None:
    check(name)
