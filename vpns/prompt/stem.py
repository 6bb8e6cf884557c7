"""The first convolution of a network, with prompt and normalisation as parts of it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from vpns.prompt.base import MEAN, STD, Prompt
from vpns_kernels.formats import unpack
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.modules import MaskedConv2d
from vpns_kernels.ops import prompt_conv2d
from vpns_kernels.sparse_modules import SparseConv2d
from vpns_kernels.tracing import find_single_calls, has_hooks, only_user

_Convolution = nn.Conv2d | SparseConv2d


class PromptedStem(nn.Module):
    """conv(normalise(prompt(images))) without an image of the canvas in memory.

    Args:
        prompt: of a variant that `prompt_conv2d` knows.
        conv: plain, masked or sparse, with 3 input channels and zeros as its padding.
    """

    def __init__(self, prompt: Prompt, conv: _Convolution) -> None:
        super().__init__()
        assert prompt.variant is not None
        self.prompt, self.conv, self.variant = prompt, conv, prompt.variant
        self.geometry = conv.geometry if isinstance(conv, SparseConv2d) else ConvGeometry.from_module(conv)

    def forward(self, images: Tensor, prompted: bool) -> Tensor:
        """[N, 3, image_size, image_size] in [0, 1] → [N, K, P, Q], in autocast's type where that is on."""
        is_cast = torch.is_autocast_enabled(images.device.type)
        dtype = torch.get_autocast_dtype(images.device.type) if is_cast else images.dtype
        return prompt_conv2d(
            images,
            self.prompt.raw if prompted else None,
            _weight(self.conv),
            self.geometry,
            self.prompt.frame,
            self.variant,
            self.conv.bias,
            MEAN,
            STD,
            dtype,
        )


def fuse_stem(traced: fx.GraphModule, prompt: Prompt) -> str:
    """Give a traced network the prompt: it then takes images in [0, 1], and whether they are prompted.

    Returns:
        Why not, in which case the network is as it was; otherwise nothing.
    """
    if prompt.variant is None:
        return f"{type(prompt).__name__} is not one that prompt_conv2d composes"
    modules = dict(traced.named_modules())
    images = next(node for node in traced.graph.nodes if node.op == "placeholder")
    node = only_user(images)
    conv = modules.get(str(node.target)) if node is not None and node.op == "call_module" else None
    is_known = type(conv) in (nn.Conv2d, MaskedConv2d, SparseConv2d)
    if node is None or not isinstance(conv, _Convolution) or not is_known:
        return "the images go into something else than one convolution"
    is_free = str(node.target) in find_single_calls(traced) and not has_hooks(conv) and not node.kwargs
    if not is_free or len(node.args) != 1:
        return f"{node.target} is called more than once, or watched"
    try:
        stem = PromptedStem(prompt, conv)
    except NotImplementedError as error:
        return str(error)
    if stem.geometry.in_channels != 3 or stem.geometry.groups != 1:
        return f"{node.target} is grouped, or does not take three channels"
    with traced.graph.inserting_after(images):
        prompted = traced.graph.placeholder("prompted")
    traced.add_module("prompted_stem", stem)
    node.target, node.args = "prompted_stem", (images, prompted)
    traced.graph.lint()
    traced.recompile()
    return ""


def _weight(conv: _Convolution) -> Tensor:
    """[K, 3, R, S] with zeros in place, differentiable in what the layer learns."""
    if isinstance(conv, SparseConv2d):
        return unpack(conv.values, conv.layout, conv.geometry)
    if isinstance(conv, MaskedConv2d):
        return conv.masked_weight()
    return conv.weight
