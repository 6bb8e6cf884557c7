"""How do programs read some channels of an activation? A run of them by descriptor, others by their list.

Either way a program reads a box of pixels × BLOCK places of the list, shifted by a tap; what lies beyond the
image or the kept channels is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton.channel_lists import ChannelList
from vpns_kernels.ops._triton.launch import describe
from vpns_kernels.ops._triton.rows import is_aligned, split_classes
from vpns_kernels.ops._triton.tiles import PixelTile


@dataclass(frozen=True)
class ChannelRows:
    """An activation as kernels read it.

    Args:
        sources: [N, H', W', C] views, one for each class of pixels.
        is_run: whether descriptors read it.
    """

    sources: list[Tensor]
    channels: ChannelList
    is_run: bool

    @classmethod
    def of(cls, x: Tensor, channels: ChannelList, stride: Pair = (1, 1)) -> ChannelRows:
        """The rows of x [N, C, H, W], wherever it lies: nothing is copied."""
        rows = x.permute(0, 2, 3, 1)
        sources = split_classes(rows, stride)
        first = channels.first
        if first is None or not is_aligned(rows[..., first:]) or not all(map(Tensor.numel, sources)):
            return cls(sources, channels, is_run=False)
        # What a descriptor does not hold is zero: a NaN in a channel beyond the run goes nowhere.
        runs = [source[..., first : first + channels.most_kept] for source in sources]
        return cls(runs, channels, is_run=True)

    def describe(self, number: int, box: PixelTile, block: int) -> Tensor | TensorDescriptor:
        """The source of a class, for kernels."""
        source = self.sources[number]
        return describe(source, (box.images, box.rows, box.columns, block)) if self.is_run else source

    def args(self, name: str) -> dict[str, Tensor | int]:
        """What kernels need to know beside the sources and their sizes.

        Args:
            name: of the activation, in the names of the arguments.
        """
        strides = self.sources[0].stride()
        return {
            f"{name}_order_ptr": self.channels.order,
            f"{name}_kept": self.channels.kept,
            **{f"stride_{name}{axis}": step for axis, step in zip("nhwc", strides, strict=True)},
        }


@triton.jit
def gather(
    x_ptr,
    order_ptr,
    at,
    kept,
    n0,
    h0,
    w0,
    offs,
    mask,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    BLOCK: tl.constexpr,
):
    """[pixels, BLOCK]: the channels at places `at` ... of the list, of the box whose corner is (n0, h0, w0).

    offs and mask tell of each pixel where it lies from the corner, and whether it is there.
    """
    corner_ptr = x_ptr + n0.to(tl.int64) * stride_n + h0.to(tl.int64) * stride_h + w0.to(tl.int64) * stride_w
    place = at + tl.arange(0, BLOCK)
    c = tl.load(order_ptr + place, mask=place < kept, other=0).to(offs.dtype)
    # In 32 bits where those suffice: addresses are most of what a program holds in registers.
    offs = offs[:, None] + (c * stride_c)[None, :]
    return tl.load(corner_ptr + offs, mask=mask[:, None] & (place < kept)[None, :], other=0)
