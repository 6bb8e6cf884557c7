"""In search over channels, a convolution need not multiply what masks have zeroed at either of its ends.

Forward it leaves out the channels that the mask of its input zeroed. Its input gradient is that of all its
inputs, for a masked one learns from it and may return, but it leaves out the outputs whose gradients the next
mask zeroed: batch norm, residual add and activation hand on zeros as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor, fx, nn

from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.graph_nodes import is_add, is_pool
from vpns_kernels.modules import ChannelMask, in_format_of
from vpns_kernels.ops._torch import autocast_input
from vpns_kernels.ops.kept_conv2d import kept_conv2d
from vpns_kernels.tracing import find_activation, find_single_calls, has_hooks, only_user


class KeptConv2d(nn.Conv2d):
    """A convolution between activations whose channels are masked, [N, C, H, W]; parameters as nn.Conv2d."""

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

    def forward(
        self, input: Tensor, input_mask: Tensor | None = None, output_mask: Tensor | None = None
    ) -> Tensor:
        """Convolve [N, C, H, W] → [N, K, P, Q] as nn.Conv2d does; a frozen layer uses the op kept_conv2d.

        Args:
            input_mask: bool [C]; the other channels of the input are zero.
            output_mask: bool [K]; the other channels' gradients are zero.
        """
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if input_mask is None or learns:
            return super().forward(input)
        x, geometry = autocast_input(input), ConvGeometry.from_module(self)
        y = kept_conv2d(x, self.weight, input_mask, geometry, self.bias, output_mask)
        return in_format_of(input, y)


def skip_masked_channels(traced: fx.GraphModule) -> list[str]:
    """Let the convolutions of a traced network leave out channels that masks have zeroed.

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
        before = _mask_before(node, modules)
        if before is None:
            continue
        traced.set_submodule(str(node.target), KeptConv2d.from_conv(conv))
        after = _mask_after(node, modules)
        with traced.graph.inserting_before(node):
            masks = [
                traced.graph.get_attr(f"{mask.target}.mask") for mask in (before, after) if mask is not None
            ]
        node.args = (node.args[0], *masks)
        found.append(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return found


def _mask_before(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The channel mask that a node reads, through pooling at most: zeros pool to zeros."""
    source = node.all_input_nodes[0]
    while is_pool(source, modules) and not _is_watched(source, modules):
        source = source.all_input_nodes[0]
    return source if _is_mask(source, modules) else None


def _mask_after(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The channel mask through which all of a node's gradient comes, and comes with its zeros."""
    user = only_user(node)
    while user is not None and _keeps_zeros(user, modules) and not _is_watched(user, modules):
        user = only_user(user)
    return user if user is not None and _is_mask(user, modules) else None


def _keeps_zeros(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether channels whose gradient is zero hand on zeros: batch norm, residual add, activation."""
    is_norm = node.op == "call_module" and isinstance(modules[str(node.target)], nn.BatchNorm2d)
    return is_norm or is_add(node) or find_activation(node, modules) is not None


def _is_mask(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    is_mask = node.op == "call_module" and isinstance(modules[str(node.target)], ChannelMask)
    return is_mask and not _is_watched(node, modules)


def _is_watched(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and has_hooks(modules[str(node.target)])
