"""What becomes of a prompt, or a normalisation, in front of a convolution? A part of it, where it is linear.

conv(scale · pad(x) + shift) = conv'(x) + conv(shift): the weights take the scale, the padding the frame, and
the last term is one image's, computed once. Outputs that see the frame alone are that term, never computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vpns_kernels.engine.arguments import arguments_of
from vpns_kernels.engine.drafts import Draft, Framed, Lowering
from vpns_kernels.engine.trace import is_computed
from vpns_kernels.geometry import ConvGeometry

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_LINEAR = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.constant_pad_nd.default, aten.pad.default),
)


def reads_framed(node: fx.Node) -> bool:
    """Whether all that reads a node are convolutions, or linear and read by such, and so can take it in."""
    users = [user for user in node.users if is_computed(user)]
    return bool(users) and all(
        (user.target in _CONVOLUTIONS and user.args[0] is node)
        or (user.target in _LINEAR and reads_framed(user))
        for user in users
    )


def add_framed(to: Lowering, node: fx.Node, x: fx.Node, factor: Tensor, summand: Tensor) -> None:
    """factor · x + summand, for the convolutions that read it."""
    value = node.meta["val"]
    if value.dim() != 4:
        to.refuse(node, "expected [N, C, H, W]")
    before = _framed(to, node, x)
    channels = len(before.scale)
    scale = factor.reshape(1, -1, 1, 1) if factor.dim() == 0 else factor
    scale = scale.reshape((1,) * (4 - scale.dim()) + tuple(scale.shape))
    shape = (1, *before.shift.shape)
    if scale[..., :1, :1].shape != scale.shape or scale.shape[0] != 1:
        to.refuse(node, "expected a factor of each channel")
    try:
        shift = (before.shift * scale + summand).expand(shape)[0]
    except RuntimeError:
        to.refuse(
            node, f"expected a constant of the activation's size {list(shape)}, got {list(summand.shape)}"
        )
    scale = before.scale * scale.reshape(-1).expand(channels)
    to.virtual[node] = Framed(before.source, before.pads, scale, shift)


def pad_framed(to: Lowering, node: fx.Node) -> None:
    """The same constant around an activation, for the convolutions that read it."""
    if node.target == aten.constant_pad_nd.default:
        (x, sizes, amount), mode = arguments_of(node, 0.0), "constant"
    else:
        x, sizes, mode, amount = arguments_of(node, "constant", None)
    if (
        mode != "constant"
        or not reads_framed(node)
        or node.meta["val"].dim() != 4
        or len(sizes) not in (2, 4)
    ):
        to.refuse(node, "a native step pads with a constant, height and width, in front of a convolution")
    left, right, above, below = (*sizes, 0, 0)[:4]
    if min(left, right, above, below) < 0:
        to.refuse(node, "a native step does not cut edges off")
    before = _framed(to, node, x)
    shift = F.pad(before.shift, (left, right, above, below), value=float(amount or 0))
    # Where nothing was, the source gives nothing; there the constant is all.
    pads = (before.pads[0] + above, before.pads[1] + left)
    to.virtual[node] = Framed(before.source, pads, before.scale, shift)


def convolve_framed(
    to: Lowering, node: fx.Node, framed: Framed, weight: fx.Node, bias: Any, geometry: ConvGeometry
) -> None:
    """The convolution of something framed."""
    found, layer = to.tensor_of(node, weight), to.layer_of(weight)
    if geometry.groups != 1:
        to.refuse(node, "expected a convolution without groups in front")
    value = to.value_of(node, framed.source)
    shift = None if bias is None else to.tensor_of(node, bias)
    padding, dilation = geometry.padding, geometry.dilation
    constant = F.conv2d(framed.shift[None], found, shift, geometry.stride, padding, dilation)[0]
    output = to.add_value(node)
    height, width = to.size_of(output)[1:]
    rows = (padding[0] + framed.pads[0], padding[1] + framed.pads[1])
    wider = replace(geometry, padding=rows)
    if wider.output_size(*to.size_of(value)[1:]) != (height, width):
        to.refuse(node, "expected a frame that is as wide below as above, and right as left")
    draft = Draft("conv2d", layer, wider, value, output, found * framed.scale.view(1, -1, 1, 1))
    draft.kept = to.kept_of(layer, found).view(geometry.weight_shape)
    if _is_bias(constant) and rows == padding:
        draft.bias = constant[:, 0, 0].clone()
    else:
        draft.constant = constant
    to.add_step(node, draft)


def _framed(to: Lowering, node: fx.Node, x: Any) -> Framed:
    if isinstance(found := to.virtual.get(x), Framed):
        return found
    channels, height, width = to.size_of(to.value_of(node, x))
    ones = torch.ones(channels, dtype=torch.float64, device=to.device)
    return Framed(x, (0, 0), ones, ones.new_zeros(channels, height, width))


def _is_bias(constant: Tensor) -> bool:
    """Whether a constant is the same for all pixels."""
    return not constant.is_meta and bool((constant == constant[:, :1, :1]).all())
