"""How does a network whose channels are pruned become a smaller network?

On the traced graph: what a dead channel takes in weights, batch norms, residual adds, concatenations and the
classifier is cut out. A channel is dead if what reads it sees zeros, or multiplies it by zeros, or sees a
constant that its bias can hold: a zero filter behind batch norm and ReLU leaves relu(b), which a layer that
pads its input with zeros would miss at the border, so there such a channel stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from vpns_kernels.channel_flow import ChannelFlow, Flow, Place
from vpns_kernels.convert import freeze, mask_modules
from vpns_kernels.copying import copy_network
from vpns_kernels.tracing import check_evaluating, trace

# How far apart outputs may be, by largest entry, before one calls it a defect.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3}


def shrink(
    model: nn.Module,
    example_input: Tensor | None = None,
    keep: Mapping[str, Tensor] | None = None,
    rows: Sequence[int] | None = None,
) -> fx.GraphModule:
    """A smaller copy of a channel-pruned network in evaluation mode; the same outputs, to rounding.

    Args:
        model: masked (scores and masks as mask_layers hangs them in), or plain with zeros where pruned.
        example_input: [N, 3, H, W]; where given, the outputs of both networks are compared for it.
        keep: by layer name, bool [out_channels]: False drops the channels that the layer makes and all that
            is added to them, as if they were 0 where they are read.
        rows: which outputs of the classifier stay, in this order; all by default.

    Returns:
        A torch.fx.GraphModule with the parameter names of the model. At least one channel of each stays.

    Raises:
        ValueError: training mode; channels of `keep` that cannot be dropped; rows that are not there.
        NotImplementedError: a network that torch.fx cannot trace.
        RuntimeError: outputs that differ (a defect).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        >>> with torch.no_grad():
        ...     _ = network[0].weight[1:].zero_()
        >>> print(shrink(network).get_submodule("0"))
        Conv2d(3, 1, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    check_evaluating("shrink", model)
    plain = freeze(model) if mask_modules(model) else copy_network(model)
    traced = trace(plain)
    if traced is None:
        raise NotImplementedError(
            f"shrink: expected a network that torch.fx can trace, got {type(model).__name__} (its forward "
            "branches on data, has optional arguments, or is watched by hooks)"
        )
    flow = ChannelFlow(traced)
    if keep is not None:
        _mask_readers(flow, keep)
    before = None if example_input is None else copy.deepcopy(traced)
    dead = _find_dead(flow)
    _cut(flow, dead, _output_rows(flow, rows))
    traced.eval()
    if before is not None and example_input is not None:
        _compare(before, traced, example_input, rows)
    return traced


@torch.no_grad()
def _mask_readers(flow: ChannelFlow, keep: Mapping[str, Tensor]) -> None:
    """Zero the weights that read what is not kept."""
    is_kept: dict[int, bool] = {}
    said_by: dict[int, str] = {}
    for name, mask in keep.items():
        place = flow.places.get(name)
        if place is None or place.after is None or not isinstance(place.layer, nn.Conv2d | nn.Linear):
            raise ValueError(
                f"shrink: expected keep for layers whose channels can be followed, got {name!r} "
                f"(there are {[n for n, p in flow.places.items() if p.is_mixing]})"
            )
        if mask.dtype != torch.bool or mask.shape != place.after.ids.shape:
            raise ValueError(
                f"shrink: expected bool masks of {len(place.after.ids)} channels for {name!r}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        for root, kept in zip(flow.roots(place.after.ids).tolist(), mask.tolist(), strict=True):
            if is_kept.setdefault(root, kept) != kept:
                raise ValueError(
                    f"shrink: expected the same channels kept by {said_by[root]!r} and {name!r}, whose "
                    "outputs are added, got others"
                )
            said_by[root] = name
    pinned = flow.pinned()
    dropped = torch.zeros_like(pinned)
    dropped[torch.tensor([root for root, kept in is_kept.items() if not kept], dtype=torch.long)] = True
    if bool((pinned & dropped).any()):
        root = int((pinned & dropped).nonzero()[0])
        raise ValueError(
            f"shrink: expected keep to drop channels that can be cut, got {said_by[root]!r} (what it makes "
            "is an output of the network, or meets an operation that is not followed)"
        )
    for place in flow.places.values():
        if place.is_mixing and place.before is not None:
            weight = place.layer.weight
            assert isinstance(weight, Tensor)
            weight[:, _columns(place, dropped[flow.roots(place.before.ids)])] = 0


def _find_dead(flow: ChannelFlow) -> Tensor:
    """Bool by id: what no output of the network depends on; never all channels of a layer."""
    spared = torch.zeros_like(flow.pinned())
    while True:
        dead = _settle(flow, spared)
        emptied = [
            roots
            for found in flow.flows.values()
            if found is not None and bool(dead[roots := flow.roots(found.ids)].all())
        ]
        if not emptied:
            return dead
        spared[torch.stack([roots[0] for roots in emptied])] = True


def _settle(flow: ChannelFlow, spared: Tensor) -> Tensor:
    """Cutting what makes a channel can leave others unread, so this repeats until nothing is added."""
    readers = [(place, before) for place in flow.places.values() if (before := _read(place)) is not None]
    roots = {id(place): flow.roots(before.ids) for place, before in readers}
    is_zero = {id(place): (place.taps() == 0).all(dim=2) for place, _ in readers}
    dead = torch.zeros_like(spared)
    while True:
        blocked = flow.pinned() | spared
        for place, before in readers:
            assert place.after is not None
            is_live = ~dead[flow.roots(place.after.ids)]
            is_unread = is_zero[id(place)][is_live].all(dim=0)
            is_held = before.values == 0 if place.pads_zeros else ~before.values.isnan()
            blocked[roots[id(place)][~(is_unread | is_held)]] = True
        # Ids that are tied to another are named by that one.
        found = ~blocked & (flow.roots(torch.arange(len(blocked))) == torch.arange(len(blocked)))
        if torch.equal(found, dead):
            return dead
        dead = found


def _read(place: Place) -> Flow | None:
    return place.before if place.is_mixing else None


def _output_rows(flow: ChannelFlow, rows: Sequence[int] | None) -> tuple[Place, Tensor] | None:
    """The layer that makes the network's output, and which of its rows stay."""
    if rows is None:
        return None
    made = None if flow.output is None else flow.flows[flow.output]
    makers = [p for p in flow.places.values() if made is not None and p.is_mixing and p.after is not None]
    makers = [p for p in makers if made is not None and torch.equal(p.after.ids, made.ids)]  # type: ignore[union-attr]
    if len(makers) != 1 or made is None:
        raise ValueError("shrink: expected rows for a network that ends with one layer's output, got another")
    count = len(made.ids)
    if not rows or len(set(rows)) != len(rows) or not all(0 <= row < count for row in rows):
        raise ValueError(f"shrink: expected different rows in 0..{count - 1}, at least one, got {list(rows)}")
    return makers[0], torch.tensor(list(rows), dtype=torch.long)


@torch.no_grad()
def _cut(flow: ChannelFlow, dead: Tensor, output: tuple[Place, Tensor] | None) -> None:
    for place in flow.places.values():
        assert place.after is not None
        stays = (~dead[flow.roots(place.after.ids)]).nonzero().flatten()
        if output is not None and output[0] is place:
            stays = output[1]
        if isinstance(place.layer, nn.BatchNorm2d | nn.BatchNorm1d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                _take(place.layer, name, stays)
            place.layer.num_features = len(stays)
        elif place.is_mixing:
            _cut_inputs(flow, place, dead)
            _cut_outputs(place.layer, stays)
        else:
            assert isinstance(place.layer, nn.Conv2d)
            assert place.before is not None
            _cut_outputs(place.layer, stays)
            left = int((~dead[flow.roots(place.before.ids)]).sum())
            place.layer.in_channels = place.layer.groups = left


def _cut_inputs(flow: ChannelFlow, place: Place, dead: Tensor) -> None:
    """Cut what reads dead channels; the constants among them go into the bias."""
    layer, before = place.layer, place.before
    if before is None:
        return
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    is_dead = dead[flow.roots(before.ids)]
    constants = before.values.nan_to_num(0.0) * is_dead
    if bool(constants.any()):
        added = (place.taps().sum(dim=2) * constants).sum(dim=1)
        if layer.bias is not None:
            added = added + layer.bias.cpu().double()
        if bool(added.any()):
            layer.bias = nn.Parameter(added.to(layer.weight), layer.weight.requires_grad)
    stays = (~_columns(place, is_dead)).nonzero().flatten()
    _take(layer, "weight", stays, axis=1)
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = len(stays)
    else:
        layer.in_features = len(stays)


def _cut_outputs(layer: nn.Module, stays: Tensor) -> None:
    _take(layer, "weight", stays)
    _take(layer, "bias", stays)
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(stays))


def _take(layer: nn.Module, name: str, stays: Tensor, axis: int = 0) -> None:
    """Keep these entries of a parameter or buffer, in the memory format it has."""
    tensor = getattr(layer, name)
    if tensor is None or torch.equal(stays, torch.arange(tensor.shape[axis])):
        return
    taken = tensor.detach().index_select(axis, stays.to(tensor.device))
    if taken.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        taken = taken.contiguous(memory_format=torch.channels_last)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(layer, name, nn.Parameter(taken, tensor.requires_grad) if is_parameter else taken)


def _columns(place: Place, is_chosen: Tensor) -> Tensor:
    """By input of the layer's weight, whether its channel is chosen: behind a flatten, each pixel."""
    weight = place.layer.weight
    assert isinstance(weight, Tensor)
    return is_chosen.repeat_interleave(weight.shape[1] // len(is_chosen))


@torch.no_grad()
def _compare(before: nn.Module, after: nn.Module, x: Tensor, rows: Sequence[int] | None) -> None:
    expected, found = before(x), after(x)
    if rows is not None:
        expected = expected[:, list(rows)]
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= _ROUNDING.get(found.dtype, 0.1):
        raise RuntimeError(
            f"shrink: expected the outputs of the masked network, got a relative error of {error}"
        )
