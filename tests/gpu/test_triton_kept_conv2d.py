"""Convolutions between masked channels by Triton: values and gradients against float64, what is not read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.test_gpu_waits import Reads
from tests.gpu.test_triton_channels import KEPT, LAYERS, assert_within, keep
from tests.gpu.test_triton_gradients import DTYPES, draw, gradients
from vpns_kernels import ConvGeometry, kept_conv2d
from vpns_kernels.testing import conv_excess, poisoned_memory

# Every layer once, and on one of them every way to keep and every type.
ROWS = [(layer, "few", torch.float32) for layer in LAYERS if layer != "stem"]
ROWS += [("3x3_stride_2", which, DTYPES[-1]) for which in KEPT]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def make_tensors(
    geometry: ConvGeometry, which: str, dtype: torch.dtype, size: tuple[int, int, int]
) -> list[Tensor]:
    """x, the weight, the bias, the masks of inputs and outputs, and the result's gradient."""
    (N, H, W), K, C = size, geometry.out_channels, geometry.in_channels
    output_mask, input_mask = keep(geometry, which)
    x = draw(N, C, H, W, seed=2).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = draw(N, K, *geometry.output_size(H, W), seed=4).to(dtype)
    x[:, ~input_mask] = grad[:, ~output_mask] = 0
    return [x, draw(*geometry.weight_shape, seed=1), draw(K, seed=3), input_mask, output_mask, grad]


@pytest.mark.parametrize(("layer", "which", "dtype"), ROWS, ids=str)
def test_a_layer_and_its_gradient(layer: str, which: str, dtype: torch.dtype, device: torch.device) -> None:
    geometry, size = LAYERS[layer]
    x, weight, bias, input_mask, output_mask, grad = make_tensors(geometry, which, dtype, size)
    truth_x, _ = gradients(x, weight.to(dtype), grad, geometry)
    scale_x, _ = gradients(x, weight.to(dtype).abs(), grad.abs(), geometry)
    # What is masked is not read.
    given, last = x.clone(), grad.clone()
    given[:, ~input_mask] = last[:, ~output_mask] = float("nan")
    leaf = given.to(device).requires_grad_()
    masks = input_mask.to(device), output_mask.to(device)
    y = kept_conv2d(leaf, weight.to(device), masks[0], geometry, bias.to(device), masks[1], "triton")
    (grad_x,) = torch.autograd.grad(y, leaf, last.to(device))
    assert y.dtype == grad_x.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv_excess(y.detach().cpu(), x, weight.to(dtype), bias, geometry) <= 1
    assert_within(grad_x, truth_x, scale_x, dtype)


def test_without_a_mask_of_the_outputs_the_gradient_is_torchs(device: torch.device) -> None:
    geometry, size = LAYERS["3x3"]
    x, weight, _, input_mask, _, grad = (
        t.to(device) for t in make_tensors(geometry, "few", torch.float32, size)
    )
    found = []
    for backend in ("triton", "reference"):
        y = kept_conv2d(x.requires_grad_(), weight, input_mask, geometry, backend=backend)
        found.append(torch.autograd.grad(y, x, grad)[0])
    assert torch.equal(*found)


def test_masks_hand_no_numbers_to_the_host(device: torch.device) -> None:
    geometry, size = LAYERS["3x3_stride_2"]
    tensors = [t.to(device) for t in make_tensors(geometry, "few", torch.float32, size)]
    x, weight, bias, input_mask, output_mask, grad = tensors

    def run() -> None:
        y = kept_conv2d(x.requires_grad_(), weight, input_mask, geometry, bias, output_mask, "triton")
        torch.autograd.grad(y, x, grad)

    run()
    with Reads() as reads:
        run()
    assert reads.names == []


def test_what_the_kernels_do_not_take_is_refused_and_who_does_is_named(device: torch.device) -> None:
    geometry = ConvGeometry(32, 32, (3, 3), (3, 3))
    x, weight, _, input_mask, _, _ = make_tensors(geometry, "few", torch.float32, (1, 9, 9))
    args = (x.to(device), weight.to(device), input_mask.to(device), geometry)
    with pytest.raises(NotImplementedError, match=r"strides of 1 and 2, got \(3, 3\).*'reference'"):
        kept_conv2d(*args, backend="triton")
