"""Which layers may sparse tensor cores take, and is the product around them a 1x1 convolution?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels import parse_pattern
from vpns_kernels.engine.gpu_compile import choose_kernels
from vpns_kernels.engine.gpu_weights import LayerWeights
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.semi_structured import multiply_pixels, obeys_two_of_four, why_no_device, why_not
from vpns_kernels.engine.trace import trace_network

CPU = torch.device("cpu")


def prune(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(parse_pattern("nm:2:4").keep_largest(weight))


def weights_of(layer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> LayerWeights:
    x = torch.randn(2, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(2, 64, 1, 1)
    network = layer if isinstance(layer, nn.Conv2d) else nn.Sequential(nn.Flatten(), layer)
    plan = draft_plan(lower(trace_network(network.eval(), x)), dtype, {})
    (step,) = (step for step in plan.steps if step.layer is not None)
    return LayerWeights.of_step(plan, step, CPU)


@pytest.mark.parametrize("layer", [nn.Linear(64, 32), nn.Conv2d(64, 32, 1), nn.Conv2d(64, 32, 1, 2)])
def test_a_layer_that_fits_is_kept_from_it_by_the_device_alone(layer: nn.Module) -> None:
    prune(layer.weight)
    assert why_not(weights_of(layer)) == "it needs a GPU, got cpu"


@pytest.mark.parametrize(
    ("layer", "is_pruned", "reason"),
    [
        (nn.Conv2d(64, 32, 3), True, "linear layers and 1x1"),
        (nn.Conv2d(64, 32, 1, padding=1), True, "linear layers and 1x1"),
        (nn.Conv2d(64, 32, 1, groups=2), True, "linear layers and 1x1"),
        (nn.Conv2d(64, 32, 1), False, "more than 2 are kept"),
        (nn.Conv2d(48, 32, 1), True, "multiples of 64 inputs and 32 outputs, got 48 inputs and 32 outputs"),
        (nn.Conv2d(64, 40, 1), True, "multiples of 64 inputs and 32 outputs, got 64 inputs and 40 outputs"),
    ],
)
def test_what_does_not_fit_is_named(layer: nn.Module, is_pruned: bool, reason: str) -> None:
    if is_pruned:
        prune(layer.weight)
    assert reason in str(why_not(weights_of(layer)))


def test_float32_is_refused() -> None:
    layer = nn.Conv2d(64, 32, 1)
    prune(layer.weight)
    assert why_not(weights_of(layer, torch.float32)) == "it takes bfloat16 and float16, got float32"


def test_an_old_gpu_is_refused_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = why_no_device(torch.device("cuda:0"))
    assert reason == "it needs a GPU of compute capability 8.0, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_no_device(torch.device("cuda:0")) is None


def test_groups_run_along_the_inputs_at_a_fixed_tap() -> None:
    weight = torch.ones(2, 8, 2, 2)
    assert not obeys_two_of_four(weight)
    weight[:, 0::4] = weight[:, 2::4] = 0
    assert obeys_two_of_four(weight)
    # As many zeros, three of four neighbours kept.
    weight[0, :4, 1, 0], weight[0, 4:, 1, 0] = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0, 0, 0, 1.0])
    assert not obeys_two_of_four(weight)
    # A ragged last group may be full where it is small.
    assert obeys_two_of_four(torch.ones(1, 2))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_product_of_pixels_is_the_1x1_convolution(stride: int) -> None:
    weights = weights_of(nn.Conv2d(64, 32, 1, stride), torch.float32)
    x = torch.randn(2, 64, 7, 5).contiguous(memory_format=torch.channels_last)
    y = multiply_pixels(weights, x, weights.dense.flatten(1))
    torch.testing.assert_close(y, F.conv2d(x, weights.dense, weights.bias, stride))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert multiply_pixels(weights, x[:0], weights.dense.flatten(1)).shape[0] == 0


def test_the_report_of_a_pruned_layer_says_why_it_does_not_run_so() -> None:
    layer = nn.Conv2d(64, 32, 1)
    prune(layer.weight)
    network = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(2, 64, 4, 4)
    plan = draft_plan(lower(trace_network(network, x)), torch.bfloat16, {})
    (row,) = choose_kernels(plan, (), CPU, x).explain(quiet=True).rows()
    assert "semi-structured: it needs a GPU, got cpu" in row["reason"]
