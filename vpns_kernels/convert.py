"""How does a network get masks, and how does it become plain again?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from vpns_kernels.channels import find_streams, trace_streams, zero_channels
from vpns_kernels.copying import copy_network
from vpns_kernels.formats import holding_pattern
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.modules import ChannelMask, MaskedConv2d, MaskedLinear, MaskModule, copy_attributes
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear, is_own_kind

# The name under which a channel mask hangs in the traced network, one per stream.
_STREAM_PREFIX = "channel_mask_"


def stream_name(number: int) -> str:
    """The name of the mask of a stream of channels, and of its scores, by its place in order of execution."""
    return f"{_STREAM_PREFIX}{number}"


def mask_layers(model: nn.Module, pattern: Pattern) -> nn.Module:
    """The model with every maskable layer masked, all units kept and all scores zero.

    Weight patterns replace each Conv2d and Linear by its masked twin, in place, the first convolution and
    the head among them (paper, section 3). The channel pattern returns a traced copy of the graph over the
    same layers, with one mask per stream of tied channels.

    Raises:
        ValueError: a model without any convolution or linear layer, or one that is masked already.
        NotImplementedError: a layer with a forward of its own, or the channel pattern on a network whose
            channels cannot be followed; names the layer or node.
    """
    if mask_modules(model):
        raise ValueError(f"mask_layers: expected a plain model, got masked {list(mask_modules(model))}")
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"mask_layers: expected a model with Conv2d or Linear layers, got {type(model).__name__}"
        )
    for name, layer in layers.items():
        # A subclass may use its weight in ways that a masked twin would not repeat (nn.MultiheadAttention's).
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise NotImplementedError(
                f"mask_layers: expected Conv2d and Linear themselves, got {type(layer).__name__} at {name!r}"
            )
    if isinstance(pattern, Channel):
        return _mask_channels(model)
    for name, layer in layers.items():
        twin = MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedLinear
        model = _replace(model, name, twin.from_dense(layer, pattern))
    return model


def mask_modules(model: nn.Module) -> dict[str, MaskModule]:
    """Every module that carries scores and a mask, by name, in order of definition."""
    kinds = (MaskedConv2d, MaskedLinear, ChannelMask)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def freeze(model: nn.Module) -> nn.Module:
    """A plain copy of a masked network: zeros where weights are masked, same outputs, torch's own keys."""
    plain = copy_network(model)
    if isinstance(plain, fx.GraphModule) and any(isinstance(m, ChannelMask) for m in plain.modules()):
        return _freeze_channels(plain)
    for name, layer in mask_modules(plain).items():
        assert not isinstance(layer, ChannelMask)
        plain = _replace(plain, name, _plain_twin(layer))
    return plain


def weight_masks(model: nn.Module) -> dict[str, Tensor]:
    """The bool mask of every masked weight of a masked network, by the weight's layer name."""
    frozen = freeze(_with_ones(model)) if _is_channel_masked(model) else None
    if frozen is not None:
        return {
            name: layer.weight.detach() != 0
            for name, layer in frozen.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        }
    layers = mask_modules(model)
    return {n: layer.weight_mask() for n, layer in layers.items() if not isinstance(layer, ChannelMask)}


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor | None] | None = None,
    pattern: Pattern | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A copy of a plain network whose layers hold packed weights and run sparsely.

    Args:
        masks: bool weight masks by layer name; layers without one stay dense. None takes the zeros of every
            layer that has any as its mask (networks pruned by any tool), and leaves layers dense that compute
            in a way of their own or whose weights their parents read (attention's).
        pattern: how the weights are packed; unstructured by default, which takes any mask. So are grouped
            convolutions whose groups the pattern's format cannot hold (depthwise ones, say).
        dtype: of the packed values; the weights' own by default.

    Raises:
        ValueError: a mask for a layer that is not there, or one that does not fit, or a masked network.
    """
    if mask_modules(model):
        raise ValueError("sparsify: expected a plain network, got a masked one (freeze it first)")
    sparse = copy_network(model)
    layers = _layers(sparse)
    if masks is None:
        own = {name: layer for name, layer in layers.items() if not is_own_kind(layer)}
        others = _read_by_others(sparse)
        masks = {n: None for n, x in own.items() if n not in others and not bool((x.weight != 0).all())}
    unknown = sorted(set(masks) - set(layers))
    if unknown:
        raise ValueError(f"sparsify: expected masks of Conv2d or Linear layers, got {unknown}")
    twins: dict[int, SparseConv2d | SparseLinear] = {}
    for name, mask in masks.items():
        layer = layers[name]
        twin: SparseConv2d | SparseLinear
        if isinstance(layer, nn.Conv2d):
            held = pattern and holding_pattern(pattern, ConvGeometry.from_module(layer))
            twin = SparseConv2d.from_dense(layer, mask, held, dtype)
        else:
            twin = SparseLinear.from_dense(layer, mask, pattern, dtype)
        # A weight that layers share stays shared.
        first = twins.setdefault(id(layer.weight), twin)
        if type(first) is type(twin) and first.values.shape == twin.values.shape:
            twin.values = first.values
        sparse = _replace(sparse, name, twin)
    return sparse


def densify(model: nn.Module) -> nn.Module:
    """A copy with torch's own layers again, zeros in place, equal to the last bit.

    Raises:
        ValueError: a layer that also adds a residual or activates, which torch's own do not.
    """
    dense = copy_network(model)
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, SparseConv2d | SparseLinear)}
    fused = {name for name, layer in layers.items() if layer.act != "none"}
    if isinstance(dense, fx.GraphModule):
        calls = [node for node in dense.graph.nodes if str(node.target) in layers]
        fused |= {str(node.target) for node in calls if len(node.all_input_nodes) > 1}
    if fused:
        raise ValueError(
            f"densify: expected layers as sparsify makes them, got residual or activation in {sorted(fused)} "
            "(densify the network before it is fused)"
        )
    for name, layer in layers.items():
        dense = _replace(dense, name, layer.to_dense())
    return dense


def _read_by_others(model: nn.Module) -> set[str]:
    """Names of layers whose weights the modules around them read."""
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, readers)
        for name, _ in module.named_modules()
    }


def _layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def _is_channel_masked(model: nn.Module) -> bool:
    return any(isinstance(module, ChannelMask) for module in model.modules())


def _with_ones(model: nn.Module) -> nn.Module:
    """A copy whose weights are all one, so that what freezing zeroes is exactly the mask."""
    ones = copy_network(model)
    for module in ones.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.ones_(module.weight)
    return ones


def _mask_channels(model: nn.Module) -> fx.GraphModule:
    traced, streams = trace_streams(model)
    if not streams:
        raise ValueError(f"mask_layers: expected a model with prunable channels, got {type(model).__name__}")
    device = next(model.parameters()).device
    for number, stream in enumerate(streams):
        name = stream_name(number)
        traced.add_module(name, ChannelMask(stream.channels, device))
        for site in stream.sites:
            with traced.graph.inserting_after(site):
                masked = traced.graph.call_module(name, (site,))
            for user in list(site.users):
                if user is not masked:
                    user.replace_input_with(site, masked)
    traced.recompile()
    traced.train(model.training)
    return traced


def _freeze_channels(traced: fx.GraphModule) -> fx.GraphModule:
    keeps: list[Tensor] = []
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(_STREAM_PREFIX):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    for name in [name for name, _ in traced.named_children() if name.startswith(_STREAM_PREFIX)]:
        keeps.append(traced.get_submodule(name).mask)  # type: ignore[arg-type]
        traced.delete_submodule(name)
    traced.recompile()
    for stream, keep in zip(find_streams(traced), keeps, strict=True):
        zero_channels(traced, stream, keep)
    return traced


def _plain_twin(layer: MaskedConv2d | MaskedLinear) -> nn.Module:
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    plain: Any = kind.__new__(kind)
    nn.Module.__init__(plain)
    copy_attributes(layer, plain)
    del plain.pattern
    with torch.no_grad():
        weight = layer.weight * layer.weight_mask()
    plain.register_parameter("weight", nn.Parameter(weight, requires_grad=layer.weight.requires_grad))
    plain.register_parameter("bias", layer.bias)
    result: nn.Module = plain
    return result


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module in that place, and wherever else the same one stands."""
    if name == "":
        return module
    old = model.get_submodule(name)
    for alias, found in list(model.named_modules(remove_duplicate=False)):
        if found is old:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
    return model
