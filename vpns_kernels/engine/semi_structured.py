"""When do sparse tensor cores multiply? Where of 4 neighbouring inputs at most 2 are kept; by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine.gpu_weights import LayerWeights

_GROUP, _KEPT = 4, 2
# Of outputs and inputs, in torch's kernels.
_MULTIPLES = (32, 64)
_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


def obeys_two_of_four(weight: Tensor) -> bool:
    """Whether of every 4 neighbouring inputs of [K, C, ...] at most 2 are not zero."""
    kept = (weight.flatten(1) if weight.dim() == 2 else weight.flatten(2).transpose(1, 2).flatten(0, 1)) != 0
    kept = F.pad(kept, (0, -kept.shape[-1] % _GROUP))
    return bool((kept.unflatten(-1, (-1, _GROUP)).sum(-1) <= _KEPT).all())


def why_not(weights: LayerWeights) -> str | None:
    """What keeps a layer from 2:4: its shape, its mask, its type, or the device."""
    g = weights.step.geometry
    if g.kernel_size != (1, 1) or g.groups != 1 or g.padding != (0, 0):
        return "it takes linear layers and 1x1 convolutions"
    if weights.packed is None or not obeys_two_of_four(weights.dense):
        return "of some 4 neighbouring inputs more than 2 are kept"
    if g.out_channels % _MULTIPLES[0] or g.in_channels % _MULTIPLES[1]:
        sizes = f"{g.in_channels} inputs and {g.out_channels} outputs"
        return f"it takes multiples of {_MULTIPLES[1]} inputs and {_MULTIPLES[0]} outputs, got {sizes}"
    if weights.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, got {dtype_name(weights.dtype)}"
    return why_no_device(weights.device)


def why_no_device(device: torch.device) -> str | None:
    """What keeps a device from 2:4."""
    if device.type != "cuda":
        return f"it needs a GPU, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        wanted, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        return f"it needs a GPU of compute capability {wanted}, got {found}"
    return None


class SemiStructured:
    """A linear layer or 1x1 convolution by torch's semi-structured product."""

    def __init__(self, weights: LayerWeights) -> None:
        self._weights = weights
        self._matrix = torch.sparse.to_sparse_semi_structured(weights.dense.flatten(1).contiguous())

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._weights.finish(multiply_pixels(self._weights, x, self._matrix), residual)


def multiply_pixels(weights: LayerWeights, x: Tensor, matrix: Tensor) -> Tensor:
    """A 1x1 convolution [N, C, H, W] → [N, K, P, Q] as a product of pixels and a matrix [K, C]."""
    down, across = weights.step.geometry.stride
    rows = x[:, :, ::down, ::across].permute(0, 2, 3, 1)
    y = F.linear(rows.reshape(-1, rows.shape[-1]), matrix, weights.rounded_bias)
    return y.view(*rows.shape[:-1], weights.step.geometry.out_channels).permute(0, 3, 1, 2)
