"""Do masked layers compute what their mask says, and do scores get the exact gradient, masked units too?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels import Pattern, parse_pattern
from vpns_kernels.modules import ChannelMask, MaskedConv2d, MaskedLinear

SPECS = ["unstructured", "block:4x2", "block:3x5", "channel", "nm:2:4"]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided, dilated, padded": {"kernel_size": (3, 2), "stride": 2, "padding": (1, 2), "dilation": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same", "bias": False},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "groups": 2},
}


def masked_conv(spec: str, dtype: torch.dtype = torch.float64, **options: Any) -> MaskedConv2d:
    torch.manual_seed(6)
    dense = nn.Conv2d(8, 6, **({"kernel_size": 3, "padding": 1} | options), dtype=dtype)
    return with_scores(MaskedConv2d.from_dense(dense, parse_pattern(spec)))


def masked_linear(spec: str) -> MaskedLinear:
    torch.manual_seed(6)
    return with_scores(MaskedLinear.from_dense(nn.Linear(12, 7, dtype=torch.float64), parse_pattern(spec)))


def with_scores(layer: Any) -> Any:
    """Scores of either sign, a third of the units masked."""
    with torch.no_grad():
        layer.scores.copy_(torch.randn_like(layer.scores))
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.7)
    assert 0 < int(layer.mask.sum()) < layer.mask.numel()
    return layer


def unit_sum(pattern: Pattern, dense: Tensor) -> Tensor:
    """Σ over each unit's weights, from the expansion alone."""
    units = torch.zeros(pattern.units_shape(tuple(dense.shape)), dtype=dense.dtype)
    numbers = pattern.expand(torch.arange(units.numel()).view(units.shape), tuple(dense.shape))
    return units.view(-1).index_add(0, numbers.flatten(), dense.flatten()).view(units.shape)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_masked_convolution_equals_the_dense_one_with_zeros(options: dict[str, Any], spec: str) -> None:
    layer = masked_conv(spec, **options)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    dense = nn.Conv2d(8, 6, **({"padding": 1} | options), dtype=torch.float64)
    bias = {} if layer.bias is None else {"bias": layer.bias}
    dense.load_state_dict({"weight": layer.weight * layer.weight_mask(), **bias})
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("spec", SPECS)
def test_a_masked_linear_equals_the_dense_one_with_zeros(spec: str) -> None:
    layer = masked_linear(spec)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight * layer.weight_mask(), layer.bias))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_score_gradient_is_the_sign_times_the_sum_of_weight_times_gradient(kind: str, spec: str) -> None:
    layer = masked_conv(spec) if kind == "conv" else masked_linear(spec)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64) if kind == "conv" else torch.randn(4, 12).double()
    direction = torch.randn_like(layer(x))
    layer(x).backward(direction)
    # The truth: the gradient of the masked weight, by torch.
    masked = (layer.weight * layer.weight_mask()).detach().requires_grad_()
    y = F.conv2d(x, masked, layer.bias, padding=1) if kind == "conv" else F.linear(x, masked, layer.bias)
    (grad,) = torch.autograd.grad(y, masked, direction)
    expected = layer.scores.sign() * unit_sum(layer.pattern, layer.weight * grad)
    torch.testing.assert_close(layer.scores.grad, expected, rtol=1e-12, atol=1e-12)
    assert bool((layer.scores.grad[~layer.mask] != 0).all())
    torch.testing.assert_close(layer.weight.grad, grad * layer.weight_mask(), rtol=1e-12, atol=1e-12)
    assert bool((layer.weight.grad[~layer.weight_mask()] == 0).all())


def test_the_channel_score_gradient_is_the_sign_times_the_sum_of_activation_times_gradient() -> None:
    for shape in ((2, 6, 5, 4), (3, 6)):
        layer = with_scores(ChannelMask(6).double())
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(shape, dtype=torch.float64)
        y = layer(x)
        keep = layer.mask.view(1, 6, *(1 for _ in shape[2:]))
        assert torch.equal(y, x * keep)
        y.backward(direction)
        expected = layer.scores.sign() * (x * direction).detach().movedim(1, 0).flatten(1).sum(1)
        torch.testing.assert_close(layer.scores.grad, expected, rtol=1e-12, atol=1e-12)
        assert bool((layer.scores.grad[~layer.mask] != 0).all())
        assert torch.equal(x.grad, direction * keep)


def test_a_channel_mask_of_several_sites_adds_their_gradients() -> None:
    layer = with_scores(ChannelMask(4).double())
    a, b = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    (layer(a).sum() + 2 * layer(b).sum()).backward()
    expected = layer.scores.sign() * (a.sum((0, 2, 3)) + 2 * b.sum((0, 2, 3)))
    torch.testing.assert_close(layer.scores.grad, expected)


def test_a_score_of_zero_has_no_gradient() -> None:
    layer = MaskedConv2d.from_dense(nn.Conv2d(3, 4, 3), parse_pattern("unstructured"))
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    assert bool((layer.scores.grad == 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_of_input_weight_and_bias_are_those_of_the_function(spec: str) -> None:
    # The mask is a constant of the function; the score gradient is by design not a derivative.
    layer = masked_conv(spec)
    layer.scores.requires_grad_(False)
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)


def test_frozen_weights_get_no_gradient_while_scores_do() -> None:
    layer = masked_conv("unstructured")
    layer.weight.requires_grad_(False)
    layer(torch.randn(1, 8, 5, 5, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.scores.grad is not None


def test_a_twin_shares_parameters_and_starts_with_everything_kept() -> None:
    for dense in (nn.Conv2d(8, 6, 3, padding=1), nn.Linear(5, 3, bias=False).eval()):
        kind = MaskedConv2d if isinstance(dense, nn.Conv2d) else MaskedLinear
        twin = kind.from_dense(dense, parse_pattern("block:2x2"))
        assert twin.weight is dense.weight
        assert twin.bias is dense.bias
        assert twin.training == dense.training
        assert bool(twin.mask.all())
        assert not bool(twin.scores.any())
        assert twin.scores.dtype == dense.weight.dtype
        x = torch.randn(2, 8, 5, 5) if isinstance(dense, nn.Conv2d) else torch.randn(2, 5)
        assert torch.equal(twin(x), dense(x))
        assert "scores" not in dense.state_dict()


def test_hooks_come_over_and_can_still_be_removed() -> None:
    dense, calls = nn.Conv2d(3, 4, 1), []
    handle = dense.register_forward_hook(lambda *_: calls.append(1))
    twin = MaskedConv2d.from_dense(dense, parse_pattern("unstructured"))
    twin(torch.randn(1, 3, 2, 2))
    handle.remove()
    twin(torch.randn(1, 3, 2, 2))
    assert calls == [1]


@pytest.mark.parametrize("spec", SPECS)
def test_scores_and_mask_travel_in_the_state_dict(spec: str) -> None:
    layer, other = masked_conv(spec), masked_conv(spec)
    with torch.no_grad():
        for tensor in (other.scores, other.weight, other.bias):
            tensor.zero_()
        other.mask.fill_(True)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "scores", "mask"}
    other.load_state_dict(state)
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.scores, layer.scores)


def test_a_copy_stands_alone() -> None:
    layer = masked_conv("block:4x2")
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    before, twin = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        twin.mask.fill_(False)
        twin.weight.zero_()
    assert torch.equal(layer(x), before)
    assert bool((twin(x) == twin.bias.view(1, -1, 1, 1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_stays_bool_when_the_layer_changes_its_dtype(dtype: torch.dtype) -> None:
    for layer, shape in (
        (masked_conv("block:4x2"), (1, 8, 6, 6)),
        (with_scores(ChannelMask(8)), (1, 8, 6, 6)),
    ):
        layer = layer.to(dtype)
        assert layer.mask.dtype == torch.bool
        assert layer.scores.dtype == dtype
        y = layer(torch.randn(shape, dtype=dtype))
        y.float().sum().backward()
        assert y.dtype == layer.scores.grad.dtype == dtype


def test_under_autocast_scores_keep_their_dtype() -> None:
    layer = masked_conv("unstructured", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(1, 8, 6, 6))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.scores.grad.dtype == torch.float32
