"""Does the channel pattern follow a network: one mask per stream, exact freezing, gradients, refusals?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.kernels.networks import FOLLOWED, build, images
from vpns_kernels import parse_pattern
from vpns_kernels.channels import find_streams
from vpns_kernels.convert import freeze, mask_layers, mask_modules, sparsify, weight_masks

Step = Callable[[Any, Tensor], Tensor]
CHANNEL = parse_pattern("channel")
# Channels of each stream, in order of execution; the head's classes and the network's outputs have none.
STREAMS = {
    "residual": [8, 8, 12, 12],
    "pre-activation": [8, 6],
    "depthwise": [12, 6],
    "vgg": [6, 10],
    "bare": [6, 8],
    "two readers": [6, 6],
}


def masked_network(name: str, seed: int = 13) -> fx.GraphModule:
    network = mask_layers(build(name), CHANNEL).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in mask_modules(network).values():
            module.scores.copy_(torch.randn(module.scores.shape, generator=generator))
            module.mask.copy_(torch.rand(module.mask.shape, generator=generator) < 0.6)
    return network


def drop_out(network: nn.Module) -> nn.Module:
    """Without dropout, so that training mode can be compared."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


@pytest.mark.parametrize("name", FOLLOWED)
def test_each_stream_of_tied_channels_has_one_mask(name: str) -> None:
    network = build(name).eval()
    expected = network(images())
    masked = mask_layers(network, CHANNEL)
    assert [module.mask.numel() for module in mask_modules(masked).values()] == STREAMS[name]
    assert torch.equal(masked(images()), expected)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_frozen_network_equals_the_masked_one_exactly(name: str, is_training: bool) -> None:
    masked = drop_out(masked_network(name)).train(is_training)
    frozen = freeze(masked)
    assert not mask_modules(frozen)
    assert frozen.training == is_training
    assert torch.equal(frozen(images()), masked(images()))


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_frozen_network_has_the_original_keys(name: str) -> None:
    original = build(name)
    frozen = freeze(masked_network(name))
    assert set(frozen.state_dict()) == set(original.state_dict())
    original.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(original.eval()(images()), frozen.eval()(images()))


@pytest.mark.parametrize("name", FOLLOWED)
def test_weight_masks_say_which_weights_freezing_zeroes(name: str) -> None:
    masked = masked_network(name)
    masks, frozen = weight_masks(masked), freeze(masked)
    for layer, mask in masks.items():
        weight = masked.get_submodule(layer).weight
        assert torch.equal(frozen.get_submodule(layer).weight, torch.where(mask, weight, 0))
    assert not all(bool(mask.all()) for mask in masks.values())
    sparse = sparsify(frozen.eval(), masks)
    with torch.no_grad():
        torch.testing.assert_close(sparse(images()), frozen(images()))


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", FOLLOWED)
def test_every_score_gets_a_gradient_masked_channels_too(name: str, is_training: bool) -> None:
    masked = drop_out(masked_network(name)).train(is_training)
    y = masked(images(8))
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)).sum().backward()
    for module in mask_modules(masked).values():
        gradient = module.scores.grad
        assert bool(gradient.isfinite().all())
        assert 0 < int(module.mask.sum()) < module.mask.numel()
        assert bool((gradient != 0).all())


def test_a_masked_depthwise_channel_is_judged_by_its_whole_activation() -> None:
    # One mask, after the depthwise layer: a mask before it as well would starve it.
    masked, plain = masked_network("depthwise").eval(), build("depthwise").eval()
    first, second = mask_modules(masked).values()
    masked(images()).square().sum().backward()
    a = plain[:6](images()).detach()
    kept = (a * first.mask.view(1, -1, 1, 1)).requires_grad_()
    y = plain[8:](plain[6:8](kept) * second.mask.view(1, -1, 1, 1))
    (da,) = torch.autograd.grad(y.square().sum(), kept)
    torch.testing.assert_close(first.scores.grad, first.scores.sign() * (a * da).sum((0, 2, 3)))


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_score_gradient_is_the_derivative_in_a_scale_of_the_channel(name: str) -> None:
    # With everything kept, sign(S) · Σ a·da is the derivative by a factor on the channel's masks.
    network = mask_layers(drop_out(build(name)), CHANNEL).double().eval()
    for module in mask_modules(network).values():
        nn.init.ones_(module.scores)
    network(images()).square().sum().backward()
    for target, module in mask_modules(network).items():
        for channel in (0, module.mask.numel() - 1):
            values = []
            for step in (1e-6, -1e-6):
                scale = torch.ones(module.mask.numel(), dtype=torch.float64)
                scale[channel] += step
                hook = module.register_forward_hook(
                    lambda _, __, y, scale=scale: y * scale.view(1, -1, *(1 for _ in y.shape[2:]))
                )
                with torch.no_grad():
                    values.append(float(network(images()).square().sum()))
                hook.remove()
            expected = (values[0] - values[1]) / 2e-6
            assert float(module.scores.grad[channel]) == pytest.approx(expected, rel=1e-5, abs=1e-6), target


class Calls(nn.Module):
    """A convolution, a step that the test chooses, another convolution, the mean."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.a, self.b, self.step = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), step
        self.narrow, self.groups = nn.Conv2d(6, 1, 1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.line, self.head = nn.GroupNorm(2, 6), nn.Linear(7, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.step(self, F.relu(self.a(x)))))
        return self.head(x.mean((2, 3)))


REFUSED: dict[str, tuple[Step, str]] = {
    "concatenation": (lambda net, x: torch.cat([x, x], 1), "got call_function .*cat.* at 'cat'"),
    "product": (lambda net, x: x * torch.sigmoid(x), "got call_function .*sigmoid.* at 'sigmoid'"),
    "group norm": (lambda net, x: net.norm(x), "got call_module norm at 'norm'"),
    "groups": (lambda net, x: net.groups(x), "expected groups 1 or depthwise, got groups 2 at 'groups'"),
    "view": (lambda net, x: x.view(4, 6, 8, 8), "got call_method view at 'view'"),
    "mean over channels": (lambda net, x: x + x.mean(1, keepdim=True), "got call_method mean at 'mean'"),
    "flatten of pixels alone": (lambda net, x: x.flatten(2), "got call_method flatten at 'flatten'"),
    "activation of pixels": (
        lambda net, x: F.relu(x.flatten(1)),
        "but dropout after flatten, got .* 'relu_1'",
    ),
    "one channel added to all": (
        lambda net, x: x + net.narrow(x),
        "expected an add of .*got 6 and 1 at 'add'",
    ),
    "line of pixels": (lambda net, x: net.line(x), "expected inputs of 6 channels, got 7 features at 'line'"),
    "second call": (lambda net, x: net.b(x), "expected each layer .*got a second call at 'b_1'"),
    "fixed mode": (
        lambda net, x: F.dropout(x, 0.5, net.training),
        "got a function .*fixed mode at 'dropout'",
    ),
    "branch on data": (lambda net, x: x if x.sum() > 0 else -x, "expected a forward without branches"),
}


@pytest.mark.parametrize(("step", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_by_node(step: Step, message: str) -> None:
    with pytest.raises(NotImplementedError, match=f"channel pattern: .*{message}"):
        mask_layers(Calls(step), CHANNEL)


def test_a_network_without_prunable_channels_is_refused() -> None:
    for network in (nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), nn.Conv2d(3, 4, 3)):
        with pytest.raises(ValueError, match="mask_layers: expected a model with prunable channels"):
            mask_layers(nn.Sequential(network), CHANNEL)


def test_the_outputs_of_a_network_are_never_masked() -> None:
    # Class scores from a convolution, as in SqueezeNet, with a ReLU before the average.
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    streams = find_streams(fx.symbolic_trace(network))
    assert [(stream.channels, stream.producers, stream.consumers) for stream in streams] == [
        (6, ["0"], ["2"])
    ]


def test_what_is_added_to_the_input_is_not_pruned() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(x))) + x)

    masked = mask_layers(Skip(), CHANNEL)
    assert [module.mask.numel() for module in mask_modules(masked).values()] == [4]
