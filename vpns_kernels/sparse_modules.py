"""Drop-in layers with packed weights: SparseConv2d and SparseLinear.

The kept values are a parameter, their layout is in buffers, so .to(), state_dict() and optimisers see them.
With grad they go through the differentiable op, and what follows it through torch. Without, weights are put
into the kernel's order once per input shape and stay so until they change. In training mode, and from a call
with grad to the next eval(), they are compared at each call: fused optimizers and compiled steps change them
without a trace. In eval mode a change through `.data` goes unnoticed.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from vpns_kernels.copying import copy_hooks
from vpns_kernels.folding import fold_batch_norm
from vpns_kernels.formats import Packed, pack, unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops import _cpu
from vpns_kernels.ops._torch import ACTS, autocast_input, finish, is_plain
from vpns_kernels.ops.registry import OPS
from vpns_kernels.ops.sparse_conv2d import sparse_conv2d
from vpns_kernels.ops.sparse_conv2d_fused import check_inputs, sparse_conv2d_fused
from vpns_kernels.patterns import Block, Channel, Pattern, Unstructured, parse_pattern
from vpns_kernels.runners import Runner, prepare


class _Sparse(nn.Module):
    """What sparse layers share.

    Args:
        packed: the kept weights.
        bias: [K] or None.
        kernel: name of the native kernel to use; empty for the one that is expected to be fastest, torch's
            dense convolution included (`explain` tells which and why), "sparse" for the fastest but that.
        act: what the outputs pass through last: "none", "relu" or "relu6".
        backends: of sparse_conv2d, with grad: one name for all passes, or three (forward, input gradient,
            weight gradient).
    """

    values: nn.Parameter
    bias: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        kernel: str = "",
        act: str = "none",
        backends: str | tuple[str, str, str] = "auto",
    ) -> None:
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"{type(self).__name__}: expected act in {ACTS}, got {act!r}")
        self.geometry, self.pattern, self.kernel, self.act = packed.geometry, packed.pattern, kernel, act
        self.backends = backends
        self.values = nn.Parameter(packed.values)
        # A copy, so that training this layer leaves the one it came from alone.
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self._layout_names = [f"layout_{i}" for i in range(len(packed.layout))]
        for name, array in zip(self._layout_names, packed.layout, strict=True):
            self.register_buffer(name, array)
        self._cache = _cpu.PreparedCache(prepare, compares_values=True)
        self._is_shared = False
        # Stamps and checksum of the layout's arrays when they were last looked at.
        self._layout_known: tuple[tuple[tuple[int, int], ...] | None, int] = (None, 0)
        self._check_layout()

    @property
    def layout(self) -> tuple[Tensor, ...]:
        """The layout's arrays, as formats.Packed orders them."""
        # Not by get_buffer, which takes longer than all else that a small call does.
        return cast(tuple[Tensor, ...], tuple(map(self._buffers.__getitem__, self._layout_names)))

    @property
    def density(self) -> float:
        """Kept fraction of the weights, as stored."""
        return Packed(self.values, self.layout, self.pattern, self.geometry).density

    def dense_weight(self) -> Tensor:
        """[K, C / groups, R, S] with zeros in place."""
        return unpack(self.values.detach(), self.layout, self.geometry)

    def kernel_for(self, x: Tensor) -> str:
        """Name of what runs this input without grad: a native kernel, "dense" (torch), or a backend."""
        image = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
        if _cpu.why_not(image, self.values, self.kernel) is None:
            return self._prepared_for(image).kernel
        g, act = self.geometry, self.act
        sizes = (g.weight_shape, g.stride, g.padding, g.dilation, g.groups)
        given = (image, self.values, list(self.layout), self.bias, None, *sizes, act, image.dtype)
        return OPS["sparse_conv2d_fused"].resolve("auto", *given)

    def extra_repr(self) -> str:
        g = self.geometry
        act = "" if self.act == "none" else f", act={self.act}"
        return (
            f"{list(g.weight_shape)}, {self.pattern.spec}, density={self.density:.3f}, stride={g.stride}{act}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What was prepared from the values of before would keep them in memory.
        self._cache = deepcopy(self._cache)
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Another process changes shared values without a trace here.
        self._is_shared = self.values.is_shared()
        self._cache.compare_values(self._cache.compares_values or self._is_shared)
        return applied

    def train(self, mode: bool = True) -> Self:
        self._cache.compare_values(mode or self._is_shared)
        return super().train(mode)

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = autocast_input(x)
        residual = None if residual is None else autocast_input(residual)
        values, bias = self.values, self.bias
        has_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, values, bias, residual)
        )
        may_skip_op = not has_grad and is_plain(x)
        if may_skip_op and residual is None:
            known = self._cache.same_as_last(values, self.layout, x, self.kernel)
            if known is not None:
                return known.run(x, bias, None, self.act)
        check_inputs(x, self.geometry, bias, residual, self.act, x.dtype)
        if has_grad:
            if not torch.compiler.is_compiling() and not self._cache.compares_values:
                self._cache.compare_values(True)
            y = sparse_conv2d(x, values, self.layout, self.geometry, bias, self.backends)
            return finish(y, residual, self.act, y.dtype)
        if not may_skip_op or _cpu.why_not(x, values, self.kernel) is not None:
            return sparse_conv2d_fused(x, values, self.layout, self.geometry, bias, residual, self.act)
        runner = self._prepared_for(x)
        self._cache.remember(runner, values, self.layout, x, self.kernel)
        return runner.run(x, bias, residual, self.act)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._layout_known = None, 0
        super()._load_from_state_dict(*args)

    def _check_layout(self) -> None:
        """Refuse a layout that was written over: averaged like weights, it would move them, silently."""
        if not all(is_plain(a) and a.device.type == "cpu" and not a.is_inference() for a in self.layout):
            return
        stamp, checksum = tuple((a.data_ptr(), a._version) for a in self.layout), self._layout_known[1]
        if stamp == self._layout_known[0]:
            return
        found = 0
        for array in self.layout:
            found = crc32(array.detach().numpy().tobytes(), found)
        if self._layout_known[0] is not None and found != checksum:
            raise ValueError(
                f"{type(self).__name__}: expected the layout that was packed or loaded, got one that was "
                "written over in place (average parameters alone, and leave buffers of integers as they are)"
            )
        self._layout_known = stamp, found

    def _prepared_for(self, x: Tensor) -> Runner:
        self._check_layout()
        return self._cache.get(self.values, self.layout, self.geometry, x.shape, x.dtype, self.kernel)


def layout_names(model: nn.Module) -> set[str]:
    """The names of the buffers that say where packed weights stand, which training does not change."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _Sparse)}
    return {f"{name}.{own}".removeprefix(".") for name, m in layers.items() for own in m._layout_names}


def _pack_layer(
    layer: nn.Conv2d | nn.Linear,
    mask: Tensor | None,
    pattern: Pattern | str | None,
    dtype: torch.dtype | None,
    bn: Any,
) -> tuple[Packed, Tensor | None]:
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern or Unstructured()
    # Before folding: a channel whose batch norm scales it by zero is kept nevertheless.
    if mask is None:
        mask = _find_kept(layer.weight.detach(), pattern)
    elif isinstance(pattern, Block) and not torch.equal(mask, _find_kept(mask, pattern)):
        # The pruned weights of a kept block would learn.
        raise ValueError(
            f"from_dense: expected a mask of whole units of pattern {pattern.spec!r}, got one that cuts "
            "within a unit (without a mask, a unit with any weight is kept)"
        )
    if bn is not None:
        layer = fold_batch_norm(layer, bn)
    packed = pack(layer.weight, mask, pattern, ConvGeometry.from_module(layer), dtype)
    return packed, layer.bias


def _find_kept(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask that zeros tell of: a unit of the pattern is kept where any of its weights is not zero."""
    kept = weight != 0
    if not isinstance(pattern, Channel):
        return pattern.expand(pattern.reduce_sum(kept.float()) > 0, tuple(weight.shape))
    # Channels that the layer before has lost are input channels of zeros here.
    kept_out, kept_in = (side.flatten(1).any(1) for side in (kept, kept.transpose(0, 1)))
    pairs = kept_out[:, None] & kept_in[None, :]
    return pairs.reshape(*pairs.shape, *(1 for _ in weight.shape[2:])).expand_as(weight)


def check_kind(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Refuse another kind of layer, or one that uses its weight in a way of its own.

    Raises:
        TypeError: no layer of that kind.
        NotImplementedError: a subclass with a forward of its own.
    """
    if not isinstance(layer, kind):
        raise TypeError(f"from_dense: expected a {kind.__name__}, got {type(layer).__name__}")
    if is_own_kind(layer):
        raise NotImplementedError(
            f"from_dense: expected the forward of {kind.__name__}, got {type(layer).__name__} with its own"
        )


def is_own_kind(layer: nn.Module) -> bool:
    """Whether a subclass of Conv2d or Linear computes otherwise than they do."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return any(getattr(type(layer), name) is not getattr(kind, name) for name in methods)


_Dense = TypeVar("_Dense", nn.Conv2d, nn.Linear)
_Layer = TypeVar("_Layer", bound="_Sparse")


def _like(sparse: _Layer, dense: nn.Conv2d | nn.Linear) -> _Layer:
    """Trained or frozen, in the mode, and with the hooks, as the dense layer is."""
    copy_hooks(dense, sparse)
    sparse.values.requires_grad_(dense.weight.requires_grad)
    if sparse.bias is not None and dense.bias is not None:
        sparse.bias.requires_grad_(dense.bias.requires_grad)
    return sparse.train(dense.training).to(dense.weight.device)


def _fill(dense: _Dense, sparse: _Sparse) -> _Dense:
    copy_hooks(sparse, dense)
    weight = sparse.dense_weight().view_as(dense.weight)
    # Values may have been packed in another type than the bias has.
    weight = weight if sparse.bias is None else weight.to(sparse.bias.dtype)
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
        pattern: Pattern | str | None = None,
        dtype: torch.dtype | None = None,
        kernel: str = "",
        act: str = "none",
        bn: nn.BatchNorm2d | None = None,
    ) -> Self:
        """Pack a torch layer, with the batch norm (in evaluation mode) and the activation that follow it.

        Without a mask the zeros of its weight are the mask: a unit of the pattern (such as "block:32x32") is
        kept where any of its weights is not zero. Without a pattern it is unstructured.
        """
        check_kind(conv, nn.Conv2d)
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
        """act(conv(x) + bias + residual); one image without a batch dimension, as torch allows."""
        if x.dim() == 3:
            return self._convolve(
                x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
            ).squeeze(0)
        return self._convolve(x, residual)


class SparseLinear(_Sparse):
    """A linear layer with a packed weight: [..., C] → [..., K]."""

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        pattern: Pattern | str | None = None,
        dtype: torch.dtype | None = None,
        kernel: str = "",
        act: str = "none",
        bn: nn.BatchNorm1d | None = None,
    ) -> Self:
        """Pack a torch layer, with the batch norm (in evaluation mode) and the activation that follow it.

        Without a mask the zeros of its weight are the mask: a unit of the pattern (such as "block:32x32") is
        kept where any of its weights is not zero. Without a pattern it is unstructured.
        """
        check_kind(linear, nn.Linear)
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
