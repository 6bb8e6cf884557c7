"""Drop-in layers with packed weights: SparseConv2d and SparseLinear.

The kept values are a parameter, their layout is in buffers, so .to(), state_dict() and optimisers see them.
With grad they go through the op. Without, they are put into the kernel's order once per input shape and stay
so until they change (through anything but `.data`, which leaves no trace).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from vpns_kernels.formats import Packed, pack, unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops import _cpu
from vpns_kernels.ops.sparse_conv2d import compact, sparse_conv2d
from vpns_kernels.patterns import Pattern, Unstructured

# Input shapes for which a layer keeps its weights in the kernel's order.
_KEPT_SHAPES = 4


class _PreparedCache:
    """The last few prepared forms of one layer, all of the same values; never copied or saved with it."""

    def __init__(self) -> None:
        self._made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _PreparedCache:
        return _PreparedCache()

    def __reduce__(self) -> tuple[type[_PreparedCache], tuple[()]]:
        return _PreparedCache, ()

    def get(self, layer: _Sparse, x: Tensor) -> _cpu.Prepared:
        values = layer.values
        if values.is_inference():
            # Made under inference_mode: changes leave no trace, so nothing may be kept.
            return _cpu.Prepared(values, layer.layout, layer.geometry, x.shape, x.dtype, layer.kernel)
        made = self._made
        if made is None or not made.is_of(values):
            made = self._made = _Made(values.detach(), values._version, OrderedDict())
        key = (tuple(x.shape), x.dtype, layer.kernel)
        found = made.prepared.get(key)
        if found is None:
            found = _cpu.Prepared(values, layer.layout, layer.geometry, x.shape, x.dtype, layer.kernel)
            made.prepared[key] = found
            while len(made.prepared) > _KEPT_SHAPES:
                made.prepared.popitem(last=False)
        return found


@dataclass(frozen=True)
class _Made:
    """Prepared forms, and the values they were made from.

    Holding on to the values keeps their address from being given to others, so that equal address, type and
    version mean equal values.
    """

    values: Tensor
    version: int
    prepared: OrderedDict[tuple[object, ...], _cpu.Prepared]

    def is_of(self, values: Tensor) -> bool:
        """Whether nothing has changed, in place or by another tensor, since."""
        mine = self.values
        is_same = mine.data_ptr() == values.data_ptr() and mine.dtype == values.dtype
        return is_same and self.version == values._version


class _Sparse(nn.Module):
    """What sparse layers share.

    Args:
        packed: the kept weights.
        bias: [K] or None.
        kernel: name of the native kernel to use; empty for the best that takes the layer.
    """

    values: nn.Parameter
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, kernel: str = "") -> None:
        super().__init__()
        self.geometry, self.pattern, self.kernel = packed.geometry, packed.pattern, kernel
        self.values = nn.Parameter(packed.values)
        # A copy, so that training this layer leaves the one it came from alone.
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self._layout_names = [f"layout_{i}" for i in range(len(packed.layout))]
        for name, array in zip(self._layout_names, packed.layout, strict=True):
            self.register_buffer(name, array)
        self._cache = _PreparedCache()

    @property
    def layout(self) -> tuple[Tensor, ...]:
        """The layout's arrays, as formats.Packed orders them."""
        return tuple(self.get_buffer(name) for name in self._layout_names)

    @property
    def density(self) -> float:
        """Kept fraction of the weights, as stored."""
        return Packed(self.values, self.layout, self.pattern, self.geometry).density

    def dense_weight(self) -> Tensor:
        """[K, C / groups, R, S] with zeros in place."""
        return unpack(self.values.detach(), self.layout, self.geometry)

    def kernel_for(self, x: Tensor) -> str:
        """Name of what runs this input without grad: a native kernel, or the backend."""
        image = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
        if _cpu.why_not(image, self.values) is None:
            return self._cache.get(self, image).kernel
        return "compact" if compact.why_not(image, self.values) is None else "reference"

    def extra_repr(self) -> str:
        g = self.geometry
        return f"{list(g.weight_shape)}, {self.pattern.spec}, density={self.density:.3f}, stride={g.stride}"

    def _convolve(self, x: Tensor) -> Tensor:
        learned = (x, self.values) if self.bias is None else (x, self.values, self.bias)
        wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
        if wants_grad or torch.compiler.is_compiling() or _cpu.why_not(x, self.values) is not None:
            return sparse_conv2d(x, self.values, self.layout, self.geometry, self.bias)
        if x.dim() != 4 or x.shape[1] != self.geometry.in_channels:
            raise ValueError(
                f"sparse_conv2d: expected x [N, {self.geometry.in_channels}, H, W], got {list(x.shape)}"
            )
        return self._cache.get(self, x).run(x, self.bias)


def _pack_layer(
    layer: nn.Conv2d | nn.Linear, mask: Tensor | None, pattern: Pattern | None, dtype: torch.dtype | None
) -> Packed:
    mask = layer.weight.detach() != 0 if mask is None else mask
    return pack(layer.weight, mask, pattern or Unstructured(), ConvGeometry.from_module(layer), dtype)


_Dense = TypeVar("_Dense", nn.Conv2d, nn.Linear)
_Layer = TypeVar("_Layer", bound="_Sparse")


def _like(sparse: _Layer, dense: nn.Conv2d | nn.Linear) -> _Layer:
    """Trained or frozen, and in the mode, as the dense layer is."""
    sparse.values.requires_grad_(dense.weight.requires_grad)
    if sparse.bias is not None and dense.bias is not None:
        sparse.bias.requires_grad_(dense.bias.requires_grad)
    return sparse.train(dense.training)


def _fill(dense: _Dense, sparse: _Sparse) -> _Dense:
    weight = sparse.dense_weight().view_as(dense.weight)
    dense.weight = nn.Parameter(weight, requires_grad=sparse.values.requires_grad)
    if sparse.bias is not None:
        dense.bias = nn.Parameter(sparse.bias.detach().clone(), requires_grad=sparse.bias.requires_grad)
    return dense.train(sparse.training)


class SparseConv2d(_Sparse):
    """A convolution with a packed weight: [N, C, H, W] → [N, K, P, Q], channels_last."""

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        mask: Tensor | None = None,
        pattern: Pattern | None = None,
        dtype: torch.dtype | None = None,
        kernel: str = "",
    ) -> Self:
        """Pack a torch layer; without a mask its zeros are the mask, without a pattern it is unstructured."""
        return _like(cls(_pack_layer(conv, mask, pattern, dtype), conv.bias, kernel), conv)

    def to_dense(self) -> nn.Conv2d:
        """The torch layer with zeros in place."""
        g = self.geometry
        conv = nn.Conv2d(
            g.in_channels,
            g.out_channels,
            g.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            bias=self.bias is not None,
        )
        return _fill(conv, self)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x)


class SparseLinear(_Sparse):
    """A linear layer with a packed weight: [..., C] → [..., K]."""

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        pattern: Pattern | None = None,
        dtype: torch.dtype | None = None,
        kernel: str = "",
    ) -> Self:
        """Pack a torch layer; without a mask its zeros are the mask, without a pattern it is unstructured."""
        return _like(cls(_pack_layer(linear, mask, pattern, dtype), linear.bias, kernel), linear)

    def to_dense(self) -> nn.Linear:
        """The torch layer with zeros in place."""
        linear = nn.Linear(self.geometry.in_channels, self.geometry.out_channels, bias=self.bias is not None)
        return _fill(linear, self)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.geometry.in_channels:
            raise ValueError(
                f"SparseLinear: expected x [..., {self.geometry.in_channels}], got {list(x.shape)}"
            )
        y = self._convolve(x.reshape(-1, x.shape[-1], 1, 1))
        return y.reshape(*x.shape[:-1], self.geometry.out_channels)
