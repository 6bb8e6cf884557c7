"""Do convolutions that leave out masked channels compute and learn what those do that multiply them all?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from vpns_kernels import parse_pattern
from vpns_kernels.convert import mask_layers, mask_modules
from vpns_kernels.kept_channels import KeptConv2d, skip_masked_channels
from vpns_kernels.ops.kept_conv2d import compact
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
def test_outputs_and_gradients_are_those_of_all_channels(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, twin = make(density)
    assert skip_masked_channels(twin) == ["first", "wide", "point"]
    x = torch.randn(3, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    expected = learn(network, network, x)
    gathered: list[int] = []
    real = compact._gather
    monkeypatch.setattr(compact, "_gather", lambda x, kept: (gathered.append(kept.numel()), real(x, kept))[1])
    found = learn(network, twin, x)
    # Of first, wide and point, the inputs; and, the other way, the outputs.
    assert gathered == [round(density * count) for count in (8, 8, 16, 6, 16, 8)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    masked = [~mask.mask for mask in mask_modules(network).values()]
    # Channels that nobody read learn all the same.
    assert all(bool((grad[off] != 0).any()) for grad, off in zip(found[2:], masked, strict=True))


class Pooled(nn.Module):
    """Pooling between a mask and its reader, and an activation with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool, self.first = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        self.norm, self.second, self.fc = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.pool(torch.relu(self.stem(x))))
        x = torch.relu(self.norm(self.second(torch.relu(y))) + y)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_a_mask_is_found_through_pooling_and_where_all_gradients_come_through_it() -> None:
    twin = trace(mask_layers(Pooled(), parse_pattern("channel")))
    assert twin is not None
    assert skip_masked_channels(twin) == ["first", "second"]
    calls = {str(node.target): node for node in twin.graph.nodes}
    masks = {name: [str(mask.target) for mask in calls[name].args[1:]] for name in ("first", "second")}
    assert masks == {"first": ["channel_mask_0.mask"], "second": ["channel_mask_1.mask"] * 2}


@pytest.mark.parametrize("density", [0.0, 0.75])
def test_where_it_would_spare_nothing_the_bits_are_those_of_the_plain_layer(density: float) -> None:
    network, twin = make(density)
    skip_masked_channels(twin)
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, learn(network, twin, x), learn(network, network, x)))


def test_under_autocast_it_computes_in_bfloat16() -> None:
    network, twin = make(0.5)
    skip_masked_channels(twin)
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = learn(network, twin, x), learn(network, network, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_the_network_it_was_traced_from_stays_and_shares_its_tensors() -> None:
    network, twin = make(0.5)
    before = copy.deepcopy(network.state_dict())
    skip_masked_channels(twin)
    layer = twin.get_submodule("wide")
    assert isinstance(layer, KeptConv2d)
    assert layer.weight is network.get_submodule("wide").weight
    assert type(network.get_submodule("wide")) is nn.Conv2d
    assert list(network.state_dict()) == list(before)


def test_weights_that_learn_get_their_gradient() -> None:
    network, twin = make(0.5)
    skip_masked_channels(twin)
    weight = network.get_submodule("wide").weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_()
    x = torch.randn(2, 3, 11, 9)
    (found,) = torch.autograd.grad(twin(x).sum(), weight)
    (expected,) = torch.autograd.grad(network(x).sum(), weight)
    assert torch.equal(found, expected)
