"""What is one layer of a plan? A packed weight, its bias, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vpns_kernels.formats import Packed, validate
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import Block, Channel

Op = Literal["conv2d", "linear"]
OPS: tuple[Op, ...] = get_args(Op)
# Of the dense weight's entries: their places are int32.
LIMIT = 2**31
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.float16)


@dataclass(frozen=True, eq=False)
class PlanLayer:
    """One layer of a plan, valid by construction.

    Args:
        name: of the module in the network.
        bias: [K] or None.
        native: False where only torch can run it.
    """

    name: str
    op: Op
    packed: Packed
    bias: Tensor | None = None
    native: bool = True

    def __post_init__(self) -> None:
        geometry, values = self.packed.geometry, self.packed.values
        if self.op not in OPS:
            raise ValueError(f"PlanLayer: expected op in {OPS}, got {self.op!r}")
        if self.op == "linear" and geometry != ConvGeometry(
            geometry.in_channels, geometry.out_channels, (1, 1)
        ):
            raise ValueError(f"PlanLayer: expected the geometry of a linear layer, got {geometry}")
        sizes = (geometry.stride, geometry.padding, geometry.dilation)
        if self._count_padded() >= LIMIT or max(map(max, sizes)) >= LIMIT:
            raise ValueError(
                f"PlanLayer: expected a weight of fewer than 2^31 entries in whole blocks, "
                f"got {self.packed.pattern.spec} of {geometry}"
            )
        self._check_pattern(values)
        try:
            validate(values, self.packed.layout, geometry)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
        bias = self.bias
        if bias is not None and (bias.shape != (geometry.out_channels,) or not bias.is_floating_point()):
            raise ValueError(
                f"PlanLayer: expected a floating bias [{geometry.out_channels}], "
                f"got {bias.dtype} {list(bias.shape)}"
            )
        tensors = [values, *self.packed.layout, *([] if bias is None else [bias])]
        for tensor in tensors:
            if tensor.dtype not in _DTYPES or tensor.numel() >= LIMIT:
                raise ValueError(
                    f"PlanLayer: expected fewer than 2^31 entries of {_DTYPES}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )

    def _count_padded(self) -> int:
        """Entries of the dense weight with every ragged block filled up: what unpacking allocates."""
        K, C, R, S = self.packed.geometry.weight_shape
        pattern, groups = self.packed.pattern, self.packed.geometry.groups
        bk, bc = (pattern.bk, pattern.bc) if isinstance(pattern, Block) else (1, 1)
        return -(-(K // groups) // bk) * bk * groups * -(-C // bc) * bc * R * S

    def _check_pattern(self, values: Tensor) -> None:
        pattern = self.packed.pattern
        rank = 3 if isinstance(pattern, Block) else 4 if isinstance(pattern, Channel) else 1
        is_fit = values.dim() == rank
        if is_fit and isinstance(pattern, Block):
            is_fit = tuple(values.shape[1:]) == (pattern.bk, pattern.bc)
        if not is_fit:
            raise ValueError(f"PlanLayer: expected values of {pattern.spec}, got {list(values.shape)}")
