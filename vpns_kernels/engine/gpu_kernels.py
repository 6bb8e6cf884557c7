"""What can run a layer on a GPU? cuDNN with everything, and whoever leaves out what was pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns_kernels.engine import semi_structured
from vpns_kernels.engine.gpu_weights import LayerWeights, curve
from vpns_kernels.engine.semi_structured import SemiStructured, multiply_pixels
from vpns_kernels.formats import Packed
from vpns_kernels.ops import OPS
from vpns_kernels.ops._torch import ACTS, take_channels

# act(layer(x) + residual).
LayerKernel = Callable[[Tensor, Tensor | None], Tensor]
_FUSED_OP = "sparse_conv2d_fused"


@dataclass(frozen=True)
class KernelKind:
    """A way to run layers.

    Args:
        is_sparse: whether what was pruned is left out.
        why_not: the reason why it does not take a layer.
        make: the layer, ready to run.
    """

    is_sparse: bool
    why_not: Callable[[LayerWeights], str | None]
    make: Callable[[LayerWeights], LayerKernel]


@contextmanager
def _measured_algorithms() -> Iterator[None]:
    """cuDNN times its algorithms when it first sees a size, instead of guessing."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Dense:
    """torch's convolution, or product, and then what follows."""

    def __init__(self, weights: LayerWeights) -> None:
        self._weights, g = weights, weights.step.geometry
        is_product = g.kernel_size == (1, 1) and g.groups == 1 and g.padding == (0, 0)
        # A matrix of pixels' products, or the filters.
        self._matrix = weights.dense.flatten(1).contiguous() if is_product else None
        self._filters = None if is_product else weights.dense

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        weights, g = self._weights, self._weights.step.geometry
        if self._matrix is not None:
            y = multiply_pixels(weights, x, self._matrix)
        else:
            assert self._filters is not None
            sizes = (g.stride, g.padding, g.dilation, g.groups)
            with _measured_algorithms():
                y = F.conv2d(x, self._filters, weights.rounded_bias, *sizes)
        return weights.finish(y, residual)


class _DenseFused:
    """cuDNN's convolution with bias, residual and ReLU in one kernel."""

    def __init__(self, weights: LayerWeights) -> None:
        self._weights = weights
        bias = weights.rounded_bias
        self._bias = weights.dense.new_zeros(weights.dense.shape[0]) if bias is None else bias

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        weights, g = self._weights, self._weights.step.geometry
        sizes = (list(g.stride), list(g.padding), list(g.dilation), g.groups)
        with _measured_algorithms():
            if residual is None:
                return torch.cudnn_convolution_relu(x, weights.dense, self._bias, *sizes)
            return torch.cudnn_convolution_add_relu(x, weights.dense, residual, 1.0, self._bias, *sizes)


def _why_not_fused(weights: LayerWeights) -> str | None:
    if weights.device.type != "cuda":
        return f"it is a kernel of cuDNN for GPUs, got {weights.device}"
    if weights.is_linear or weights.step.act != "relu" or weights.constant is not None:
        return "it takes convolutions that end in ReLU"
    return None if weights.out_dtype == weights.dtype else "it writes what it reads"


class _Triton:
    """Blocks or channels, with bias, residual and activation in the kernel's stores."""

    def __init__(self, weights: LayerWeights) -> None:
        assert weights.packed is not None
        module, packed = OPS[_FUSED_OP].module("triton"), weights.packed
        self._weights, self._run = weights, module.run
        self._packed = replace(packed, values=module.prepare(packed.values, weights.dtype))

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        weights = self._weights
        if weights.constant is not None:
            residual = weights.constant.expand(len(x), -1, -1, -1)
        return curve(self._run(*_fused_arguments(weights, self._packed, x, residual)), weights.step.act)


def _fused_arguments(
    weights: LayerWeights, packed: Packed, x: Tensor, residual: Tensor | None
) -> tuple[object, ...]:
    """What the op's backends take."""
    g, act = weights.step.geometry, weights.step.act
    sizes = (g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
    inner = act if act in ACTS else "none"
    return (
        x,
        packed.values,
        list(packed.layout),
        weights.bias,
        residual,
        *sizes,
        inner,
        weights.out_dtype,
    )


def _why_not_triton(weights: LayerWeights) -> str | None:
    if weights.packed is None:
        return "nothing is pruned"
    if "triton" not in OPS[_FUSED_OP].backends:
        return "no such backend"
    g = weights.step.geometry
    one = torch.empty((1, g.in_channels, 1, 1), dtype=weights.dtype, device=weights.device)
    reason: str | None = (
        OPS[_FUSED_OP].module("triton").why_not(*_fused_arguments(weights, weights.packed, one, None))
    )
    return reason


class _Compact:
    """What is kept of channels as the smaller dense convolution that it is."""

    def __init__(self, weights: LayerWeights) -> None:
        assert weights.packed is not None
        self._weights = weights
        self._values = weights.packed.values.contiguous(memory_format=torch.channels_last)
        kept_out, kept_in = (array.long() for array in weights.packed.layout)
        K, C = weights.step.geometry.out_channels, weights.step.geometry.in_channels
        self._kept_in = None if len(kept_in) == C else kept_in
        self._kept_out = None if len(kept_out) == K else kept_out
        bias = weights.rounded_bias
        self._bias = bias if bias is None or self._kept_out is None else bias[kept_out]
        # Of outputs without a weight.
        self._rest = (weights.dense.new_zeros(K) if bias is None else bias).view(1, K, 1, 1)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        g = self._weights.step.geometry
        gathered = x if self._kept_in is None else take_channels(x, self._kept_in)
        shape = (len(x), g.out_channels, *g.output_size(*x.shape[2:]))
        y = None
        if self._values.numel():
            with _measured_algorithms():
                y = F.conv2d(gathered, self._values, self._bias, g.stride, g.padding, g.dilation)
        if y is None or self._kept_out is not None:
            whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            whole.copy_(self._rest.expand(shape))
            y = whole if y is None or self._kept_out is None else whole.index_copy_(1, self._kept_out, y)
        return self._weights.finish(y, residual)


def _why_not_compact(weights: LayerWeights) -> str | None:
    if weights.packed is None:
        return "nothing is pruned"
    return None if weights.packed.values.dim() == 4 else "it takes whole channels"


# In the order in which they are named; a layer gets the one that is fastest where it runs.
KERNELS: Mapping[str, KernelKind] = {
    "dense": KernelKind(False, lambda weights: None, _Dense),
    "dense fused": KernelKind(False, _why_not_fused, _DenseFused),
    "triton": KernelKind(True, _why_not_triton, _Triton),
    "compact": KernelKind(True, _why_not_compact, _Compact),
    "semi-structured": KernelKind(True, semi_structured.why_not, SemiStructured),
}


def first_kernel(weights: LayerWeights) -> str:
    """What runs a layer where nothing was timed: the first that leaves out what was pruned, else dense."""
    able = [name for name, kind in KERNELS.items() if kind.is_sparse and kind.why_not(weights) is None]
    return able[0] if able else "dense"
