"""Drop-in layers with packed weights: SparseConv2d and SparseLinear.

The kept values are a parameter, their layout is in buffers, so .to(), state_dict() and optimisers see them.
With grad they go through the differentiable op, and what follows it through torch. Without, weights are put
into the kernel's order once per input shape and stay so until they change (through anything but `.data`,
which leaves no trace).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vpns_kernels.folding import fold_batch_norm
from vpns_kernels.formats import Packed, pack, unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops import _cpu
from vpns_kernels.ops._torch import ACTS, finish
from vpns_kernels.ops.sparse_conv2d import compact, sparse_conv2d
from vpns_kernels.ops.sparse_conv2d_fused import check_inputs, sparse_conv2d_fused
from vpns_kernels.patterns import Pattern, Unstructured
from vpns_kernels.runners import Runner, prepare

# Input shapes (and dtypes and thread counts) for which a layer keeps its weights in the kernel's order.
_KEPT_SHAPES = 8


class _PreparedCache:
    """The prepared forms of one layer that were used last, all of the same weights; never copied or saved."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _PreparedCache:
        return _PreparedCache()

    def __reduce__(self) -> tuple[type[_PreparedCache], tuple[()]]:
        return _PreparedCache, ()

    def get(self, layer: _Sparse, x: Tensor) -> Runner:
        values, layout = layer.values, layer.layout
        if any(tensor.is_inference() for tensor in (values, *layout)):
            # Made under inference_mode: changes leave no trace, so nothing may be kept.
            return prepare(values, layout, layer.geometry, x.shape, x.dtype, layer.kernel)
        key = (tuple(x.shape), x.dtype, layer.kernel, torch.get_num_threads())
        with self._lock:
            made = self._made
            if made is None or not made.is_of(values, *layout):
                made = self._made = _Made.of(values, *layout)
            found = made.prepared.get(key)
            if found is not None:
                made.prepared.move_to_end(key)
                return found
        # Outside the lock: other shapes need not wait. Two threads may prepare the same; one is kept.
        found = prepare(values, layout, layer.geometry, x.shape, x.dtype, layer.kernel)
        with self._lock:
            found = made.prepared.setdefault(key, found)
            made.prepared.move_to_end(key)
            while len(made.prepared) > _KEPT_SHAPES:
                made.prepared.popitem(last=False)
        return found


@dataclass(frozen=True)
class _Made:
    """Prepared forms, least recently used first, and the weights that they were made from.

    Holding on to the tensors keeps their addresses from being given to others, so that equal address, type
    and version mean equal content.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    prepared: OrderedDict[tuple[object, ...], Runner]

    @classmethod
    def of(cls, *tensors: Tensor) -> _Made:
        return cls(tuple(t.detach() for t in tensors), tuple(t._version for t in tensors), OrderedDict())

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether nothing has changed since, in place or by other tensors."""
        return all(
            mine.data_ptr() == now.data_ptr() and mine.dtype == now.dtype and version == now._version
            for mine, version, now in zip(self.tensors, self.versions, tensors, strict=True)
        )


class _Sparse(nn.Module):
    """What sparse layers share.

    Args:
        packed: the kept weights.
        bias: [K] or None.
        kernel: name of the native kernel to use; empty for the one that is expected to be fastest, torch's
            dense convolution included (`explain` tells which and why), "sparse" for the fastest but that.
        act: what the outputs pass through last: "none", "relu" or "relu6".
    """

    values: nn.Parameter
    bias: Tensor | None

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, kernel: str = "", act: str = "none"
    ) -> None:
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"{type(self).__name__}: expected act in {ACTS}, got {act!r}")
        self.geometry, self.pattern, self.kernel, self.act = packed.geometry, packed.pattern, kernel, act
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
        """Name of what runs this input without grad: a native kernel, "dense" (torch), or the backend."""
        image = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
        if _cpu.why_not(image, self.values, self.kernel) is None:
            return self._cache.get(self, image).kernel
        return "compact" if compact.why_not(image, self.values) is None else "reference"

    def extra_repr(self) -> str:
        g = self.geometry
        act = "" if self.act == "none" else f", act={self.act}"
        return (
            f"{list(g.weight_shape)}, {self.pattern.spec}, density={self.density:.3f}, stride={g.stride}{act}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What was prepared from the values of before would keep them in memory.
        self._cache = _PreparedCache()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        check_inputs(x, self.geometry, self.bias, residual, self.act, x.dtype)
        learned = [t for t in (x, self.values, self.bias, residual) if t is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned):
            y = sparse_conv2d(x, self.values, self.layout, self.geometry, self.bias)
            return finish(y, residual, self.act, y.dtype)
        # Tracers see the op; a tensor of another type (a fake one) has no data to compute with here.
        is_plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
        if not is_plain or _cpu.why_not(x, self.values, self.kernel) is not None:
            return sparse_conv2d_fused(
                x, self.values, self.layout, self.geometry, self.bias, residual, self.act
            )
        return self._cache.get(self, x).run(x, self.bias, residual, self.act)


def _pack_layer(
    layer: nn.Conv2d | nn.Linear,
    mask: Tensor | None,
    pattern: Pattern | None,
    dtype: torch.dtype | None,
    bn: Any,
) -> tuple[Packed, Tensor | None]:
    # Before folding: a channel whose batch norm scales it by zero is kept nevertheless.
    mask = layer.weight.detach() != 0 if mask is None else mask
    if bn is not None:
        layer = fold_batch_norm(layer, bn)
    packed = pack(layer.weight, mask, pattern or Unstructured(), ConvGeometry.from_module(layer), dtype)
    return packed, layer.bias


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
        act: str = "none",
        bn: nn.BatchNorm2d | None = None,
    ) -> Self:
        """Pack a torch layer, with the batch norm (in evaluation mode) and the activation that follow it.

        Without a mask the zeros of its weight are the mask, without a pattern it is unstructured.
        """
        packed, bias = _pack_layer(conv, mask, pattern, dtype, bn)
        return _like(cls(packed, bias, kernel, act), conv)

    def to_dense(self) -> nn.Conv2d:
        """The torch layer with zeros in place, without the activation."""
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(conv(x) + bias + residual)."""
        return self._convolve(x, residual)


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
        act: str = "none",
        bn: nn.BatchNorm1d | None = None,
    ) -> Self:
        """Pack a torch layer, with the batch norm (in evaluation mode) and the activation that follow it.

        Without a mask the zeros of its weight are the mask, without a pattern it is unstructured.
        """
        packed, bias = _pack_layer(linear, mask, pattern, dtype, bn)
        return _like(cls(packed, bias, kernel, act), linear)

    def to_dense(self) -> nn.Linear:
        """The torch layer with zeros in place, without the activation."""
        linear = nn.Linear(self.geometry.in_channels, self.geometry.out_channels, bias=self.bias is not None)
        return _fill(linear, self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(x · weight + bias + residual), residual [..., K]."""
        if x.dim() == 0 or x.shape[-1] != self.geometry.in_channels:
            raise ValueError(
                f"SparseLinear: expected x [..., {self.geometry.in_channels}], got {list(x.shape)}"
            )
        shape = (*x.shape[:-1], self.geometry.out_channels)
        if residual is not None:
            if tuple(residual.shape) != shape:
                raise ValueError(f"SparseLinear: expected residual {list(shape)}, got {list(residual.shape)}")
            residual = residual.reshape(-1, shape[-1], 1, 1)
        return self._convolve(x.reshape(-1, x.shape[-1], 1, 1), residual).reshape(shape)
