"""CPU backend: csrc/cpu/masked_weight.cpp packs what is kept, the kernels of sparse_conv2d run it.

The mask changes at every step, so nothing is kept from one call to the next. Scores get their gradients from
csrc/cpu/weight_gradient.*; those of blocks are sums, where no dense weight gradient exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import native
from vpns_kernels.dtypes import DTYPE_NAMES
from vpns_kernels.geometry import ConvGeometry, Pair
from vpns_kernels.patterns import NM, Block, Pattern, Unstructured, parse_pattern

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Patterns that the library knows masks of.
_TAKEN = (Unstructured, Block, NM)


def why_not(
    x: Tensor, weight: Tensor, mask: Tensor, scores: Tensor, bias: Tensor | None, pattern: str, *rest: Any
) -> str | None:
    """CPU tensors, a float32 weight, an input in float32 or a half; masks of single weights or of blocks.

    Without vectors torch's dense kernels are faster.
    """
    if any(tensor.device.type != "cpu" for tensor in (x, weight, mask, scores)):
        return f"it takes CPU tensors, got {x.device} and {weight.device}"
    if x.dtype not in _DTYPES or weight.dtype != torch.float32:
        return f"it takes float32 or halves with float32 weights, got {x.dtype} with {weight.dtype}"
    kind = parse_pattern(pattern)
    if not isinstance(kind, _TAKEN):
        return f"it takes masks of single weights or of blocks, got {kind.spec} (of channels: channel_mask)"
    groups = rest[-1]
    if isinstance(kind, Block) and groups > 1 and weight.shape[0] // groups % kind.bk:
        return f"it takes blocks within a group, got {kind.bk} of {weight.shape[0] // groups} filters"
    return native.why_not() or (None if native.has_isa("avx2") else "it needs avx2")


def run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kernel: str = "",
) -> Tensor:
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    N, _, H, W = x.shape
    shape = (N, geometry.out_channels, *geometry.output_size(H, W))
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    if y.numel() > 0:
        bias = None if bias is None else bias.detach().float().contiguous()
        masked = _Masked(weight, mask, parse_pattern(pattern))
        _convolve(masked, x.shape, geometry, x, y, bias, False, kernel)
    return y


def run_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kernel: str = "",
) -> Tensor:
    """[N, C, H, W] as x, channels_last: the forward kernels on the transposed weight."""
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    if grad_x.numel() > 0:
        masked = _Masked(weight, mask, parse_pattern(pattern))
        _convolve(masked, x.shape, geometry, _dense(grad), grad_x, None, True, kernel)
    return grad_x


def run_score_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    pattern: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kernel: str = "",
) -> Tensor:
    """sign(S) · Σ_unit W · dW, as scores."""
    kind = parse_pattern(pattern)
    geometry = ConvGeometry.from_weight(weight.shape, stride, padding, dilation, groups)
    signed, is_block = scores.detach().float().contiguous(), isinstance(kind, Block)
    # Of blocks the library leaves the sums; of single weights it takes the scores' signs with it.
    out = torch.empty(scores.shape, dtype=torch.float32, device="cpu")
    if grad.numel() == 0:
        out.zero_()
    else:
        masked, x, grad = _Masked(weight, mask, kind), _rows(x), _dense(grad)
        native.library().masked_conv2d_score_gradient(
            _sizes(x.shape, geometry),
            masked.handle,
            x.data_ptr(),
            DTYPE_NAMES[x.dtype],
            *_strides(x),
            grad.data_ptr(),
            0 if is_block else signed.data_ptr(),
            out.data_ptr(),
            kernel,
            torch.get_num_threads(),
        )
    return (signed.sign() * out if is_block else out).to(scores.dtype)


class _Masked:
    """A weight and its mask as the library takes them; holds on to what the library reads."""

    def __init__(self, weight: Tensor, mask: Tensor, pattern: Pattern) -> None:
        memory_formats = (torch.contiguous_format, torch.channels_last)
        if not any(weight.is_contiguous(memory_format=memory_format) for memory_format in memory_formats):
            weight = weight.contiguous()
        self.tensors = weight, mask = weight.detach(), mask.contiguous()
        _, C, R, S = weight.shape
        # Strides of a size of one are anybody's: those of a dense layout.
        is_last = not weight.is_contiguous()
        strides = [R * S * C, 1, C] if is_last else [C * R * S, R * S, 1]
        block = [pattern.bk, pattern.bc] if isinstance(pattern, Block) else [1, 1]
        self.handle = native.library().MaskedWeight(weight.data_ptr(), strides, mask.data_ptr(), block)


def _convolve(
    masked: _Masked,
    x_shape: Sequence[int],
    geometry: ConvGeometry,
    source: Tensor,
    target: Tensor,
    bias: Tensor | None,
    is_input_gradient: bool,
    kernel: str,
) -> None:
    source = _rows(source)
    name, threads = DTYPE_NAMES[source.dtype], torch.get_num_threads()
    prepared = native.library().masked_conv2d_prepare(
        _sizes(x_shape, geometry), masked.handle, name, is_input_gradient, kernel, threads
    )
    bias_address = 0 if bias is None else bias.data_ptr()
    prepared.run(
        source.data_ptr(),
        name,
        *_strides(source),
        target.data_ptr(),
        name,
        bias_address,
        0,
        "none",
        threads,
    )


def _sizes(x_shape: Sequence[int], geometry: ConvGeometry) -> list[int]:
    K, _, R, S = geometry.weight_shape
    pairs = (geometry.stride, geometry.padding, geometry.dilation)
    outputs = geometry.output_size(x_shape[2], x_shape[3])
    return [*x_shape, K, R, S, *outputs, *(size for pair in pairs for size in pair), geometry.groups]


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """Channels side by side; images, rows and columns may have any stride."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else _dense(x)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of images, rows and columns."""
    return x.stride(0), x.stride(2), x.stride(3)
