"""Do convolutions that leave out masked inputs compute and learn what those do that read them all?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from vpns_kernels import parse_pattern
from vpns_kernels.convert import mask_layers, mask_modules
from vpns_kernels.kept_inputs import KeptInputConv2d, read_kept_inputs
from vpns_kernels.tracing import trace


class Block(nn.Module):
    """A residual sum, whose mask is shared, strides, a filter of one pixel and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, (2, 1), (1, 0), 2)
        self.point = nn.Conv2d(16, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.first(x)) + x)
        x = torch.relu(self.point(torch.relu(self.wide(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def make(density: float) -> tuple[nn.Module, fx.GraphModule]:
    """A masked network with frozen weights, and its twin."""
    torch.manual_seed(1)
    network = mask_layers(Block(), parse_pattern("channel")).to(memory_format=torch.channels_last)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("scores"))
    for mask in mask_modules(network).values():
        nn.init.normal_(mask.scores)
        order = torch.randperm(mask.mask.numel())
        mask.mask.copy_(order < round(density * mask.mask.numel()))
    twin = trace(network)
    assert twin is not None
    return network, twin


def learn(network: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all scores."""
    x = x.clone().requires_grad_()
    scores = [mask.scores for mask in mask_modules(network).values()]
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *scores])]


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_outputs_and_gradients_are_those_of_all_channels(density: float) -> None:
    network, twin = make(density)
    assert read_kept_inputs(twin) == ["first", "wide", "point"]
    x = torch.randn(3, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    found, expected = learn(network, twin, x), learn(network, network, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    masked = [~mask.mask for mask in mask_modules(network).values()]
    # Channels that nobody read learn all the same.
    assert all(bool((grad[off] != 0).any()) for grad, off in zip(found[2:], masked, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.75])
def test_where_it_would_spare_nothing_the_bits_are_those_of_the_plain_layer(density: float) -> None:
    network, twin = make(density)
    read_kept_inputs(twin)
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, learn(network, twin, x), learn(network, network, x)))


def test_under_autocast_it_computes_in_bfloat16() -> None:
    network, twin = make(0.5)
    read_kept_inputs(twin)
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = learn(network, twin, x), learn(network, network, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_the_network_it_was_traced_from_stays_and_shares_its_tensors() -> None:
    network, twin = make(0.5)
    before = copy.deepcopy(network.state_dict())
    read_kept_inputs(twin)
    layer = twin.get_submodule("wide")
    assert isinstance(layer, KeptInputConv2d)
    assert layer.weight is network.get_submodule("wide").weight
    assert type(network.get_submodule("wide")) is nn.Conv2d
    assert list(network.state_dict()) == list(before)


def test_weights_that_learn_get_their_gradient() -> None:
    network, twin = make(0.5)
    read_kept_inputs(twin)
    weight = network.get_submodule("wide").weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_()
    x = torch.randn(2, 3, 11, 9)
    (found,) = torch.autograd.grad(twin(x).sum(), weight)
    (expected,) = torch.autograd.grad(network(x).sum(), weight)
    assert torch.equal(found, expected)


def test_another_device_is_not_asked_what_the_mask_holds() -> None:
    layer = KeptInputConv2d.from_conv(nn.Conv2d(8, 4, 3).requires_grad_(False)).to("meta")
    mask = torch.zeros(8, dtype=torch.bool, device="meta")
    assert layer(torch.empty(2, 8, 5, 5, device="meta"), mask).shape == (2, 4, 3, 3)
