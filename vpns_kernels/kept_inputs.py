"""In search over channels, a convolution need not read what the mask of its input has zeroed.

Its forward pass gathers the kept channels and convolves those alone. Its input gradient is that of all
channels: a masked one learns from it and may return.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_input

from vpns_kernels.modules import ChannelMask
from vpns_kernels.ops._torch.autocast import autocast_input
from vpns_kernels.tracing import find_single_calls, has_hooks

Pair = tuple[int, int]
# Of more channels than this share gathering costs about what it spares.
MOST_KEPT = 0.5


class KeptInputConv2d(nn.Conv2d):
    """A convolution of an input whose channels are masked, [N, C, H, W]; parameters as nn.Conv2d."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """The twin of a convolution, over the very same parameters."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        shared = (
            "_parameters",
            "_buffers",
            "_non_persistent_buffers_set",
            "_reversed_padding_repeated_twice",
        )
        own = conv.__dict__.items()
        twin.__dict__.update({key: value for key, value in own if key in shared or not key.startswith("_")})
        return twin

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """As nn.Conv2d; on the CPU, if frozen, by the kept channels alone where at most half are kept.

        Args:
            mask: bool [C]; the other channels of the input are zero.
        """
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        # To count what is kept, a GPU would have to be waited for.
        reads_mask = mask is not None and mask.device.type == "cpu" and not learns
        kept = mask.nonzero()[:, 0] if mask is not None and reads_mask else None
        if kept is None or not 0 < kept.numel() <= MOST_KEPT * self.in_channels:
            return super().forward(input)
        x = autocast_input(input)
        sizes = (self.stride, cast(Pair, self.padding), self.dilation)
        y: Tensor = _ConvolveKept.apply(x, self.weight, self.bias, kept, *sizes)  # type: ignore[no-untyped-call]
        return y


class _ConvolveKept(torch.autograd.Function):
    """The convolution of the kept channels, with the input gradient of all."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(weight)
        ctx.x_shape, ctx.sizes = x.shape, (stride, padding, dilation)
        bias = None if bias is None else bias.to(x.dtype)
        # The last index of channels_last memory; so the result lies as the input does.
        few = x.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)
        return F.conv2d(few, weight.index_select(1, kept), bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = weight.contiguous(memory_format=torch.channels_last)
        return conv2d_input(ctx.x_shape, weight, grad, *ctx.sizes), *[None] * 6


def read_kept_inputs(traced: fx.GraphModule) -> list[str]:
    """Let the convolutions of a traced network leave out channels that their input's mask has zeroed.

    In place, as fuse_batch_norms; the network it was traced from stays as it is and shares all tensors.

    Returns:
        The names of the convolutions.
    """
    modules, called_once = dict(traced.named_modules()), find_single_calls(traced)
    found = []
    for node in list(traced.graph.nodes):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        is_plain = len(node.args) == 1 and not node.kwargs and str(node.target) in called_once
        if type(conv) is not nn.Conv2d or has_hooks(conv) or not is_plain:
            continue
        if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or not isinstance(modules[str(source.target)], ChannelMask):
            continue
        traced.set_submodule(str(node.target), KeptInputConv2d.from_conv(conv))
        with traced.graph.inserting_before(node):
            node.args = (source, traced.graph.get_attr(f"{source.target}.mask"))
        found.append(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return found
