"""Packed layers with their dense ones, and what both must agree in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels import parse_pattern, sparse_conv2d
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

SPECS = ["unstructured", "block:4x4", "block:16x16", "channel"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 2e-5}


def pruned_conv(spec: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Conv2d, Tensor]:
    """A convolution with zeros in place, and its mask."""
    torch.manual_seed(7)
    conv = nn.Conv2d(24, 16, **({"kernel_size": 3, "padding": 1} | options), dtype=dtype)
    return conv, prune(conv, spec)


def prune(layer: nn.Conv2d | nn.Linear, spec: str) -> Tensor:
    shape = tuple(layer.weight.shape)
    if spec == "channel":
        keep = torch.rand(shape[0]) < 0.6, torch.rand(shape[1]) < 0.6
        mask = (keep[0][:, None] & keep[1]).view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)
    else:
        pattern = parse_pattern(spec)
        mask = pattern.expand(torch.rand(pattern.units_shape(shape)) < 0.4, shape)
    with torch.no_grad():
        layer.weight.mul_(mask)
    return mask.contiguous()


def sparse_conv(spec: str, dtype: torch.dtype = torch.float32, **options: Any) -> SparseConv2d:
    conv, mask = pruned_conv(spec, dtype, **options)
    return SparseConv2d.from_dense(conv, mask, parse_pattern(spec))


@torch.no_grad()
def assert_is_right(layer: SparseConv2d | SparseLinear, x: Tensor, y: Tensor) -> None:
    """What the op gives for the values as they are, to the last bit; and near what torch gives."""
    image = x if isinstance(layer, SparseConv2d) else x.reshape(-1, x.shape[-1], 1, 1)
    by_op = sparse_conv2d(image, layer.values, layer.layout, layer.geometry, layer.bias)
    assert torch.equal(y, by_op.view(y.shape) if isinstance(layer, SparseLinear) else by_op)
    truth = layer.to_dense().double()(x.double())
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)
