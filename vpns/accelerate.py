"""How does a stage's network run faster? The same tensors behind other layers, chosen before it begins.

The network that a stage trains stays as it is: what is saved, loaded and frozen is its tensors. Beside it
stands its traced graph over the very same layers, where the first convolution composes the prompt, batch
norms take in what follows them, convolutions leave out masked channels, and every layer is told which backend
computes each of its passes. What was chosen is written down before the first update and read when a run goes
on: another kernel rounds otherwise, and masks would drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vpns.predictor import Predictor
from vpns.prompt.stem import fuse_stem
from vpns_kernels.batch_norms import fuse_batch_norms
from vpns_kernels.choose import query_of, query_of_kept, this_machine
from vpns_kernels.choose_training import choose_training
from vpns_kernels.cost import LayerQuery
from vpns_kernels.formats import why_not
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.kept_channels import skip_masked_channels
from vpns_kernels.modules import ChannelMask, MaskedConv2d, MaskedLinear
from vpns_kernels.ops.kept_conv2d import MOST_KEPT
from vpns_kernels.patterns import NM, Block, Unstructured
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear
from vpns_kernels.tracing import trace

_PASSES = ("forward", "input_gradient", "weight_gradient")
_Trained = MaskedConv2d | MaskedLinear | SparseConv2d | SparseLinear


class FusedPredictor(Predictor):
    """A predictor that runs a traced twin of its network.

    Args:
        twin: over the network's own layers.
        is_composing: whether the twin takes images and `prompted`, or what the prompt made of them.
    """

    def __init__(self, plain: Predictor, twin: nn.Module, is_composing: bool) -> None:
        super().__init__(plain.prompt, plain.network, plain.dtype)
        self.twin, self.is_composing = twin, is_composing

    def compute(self, images: Tensor, prompted: bool) -> Tensor:
        logits: Tensor = (
            self.twin(images, prompted) if self.is_composing else self.twin(self.prompt(images, prompted))
        )
        return logits


def fuse_predictor(predictor: Predictor, density: float = 0.0) -> tuple[Predictor, dict[str, Any]]:
    """A predictor over the same tensors that does more in each pass, and what was done, for the record.

    Args:
        density: of what the masks keep. A GPU, which nobody asks for their counts, leaves masked channels out
            only where few are kept.
    """
    twin = trace(predictor.network)
    if twin is None:
        why_not = "torch.fx cannot trace the network"
        return predictor, dict.fromkeys(("prompted_stem", "batch_norms", "kept_channels"), why_not)
    norms = fuse_batch_norms(twin)
    why_not = fuse_stem(twin, predictor.prompt)
    is_worth_it = density <= MOST_KEPT or next(twin.parameters()).device.type == "cpu"
    kept = skip_masked_channels(twin) if is_worth_it else f"more than {MOST_KEPT:g} of all channels stay"
    fused = FusedPredictor(predictor, twin, is_composing=not why_not)
    return fused, {"prompted_stem": why_not or "fused", "batch_norms": norms, "kept_channels": kept}


def choose_backends(predictor: Predictor, images: Tensor) -> dict[str, Any]:
    """Who computes each pass of every masked and sparse layer, by name, and why; nothing is timed.

    Args:
        images: of a batch's shape; what they show does not matter.
    """
    machine, found = this_machine(images.device), {}
    for name, (shape, dtype) in _input_shapes(predictor, images).items():
        layer = predictor.network.get_submodule(name)
        if refusal := _why_dense(layer):
            found[name] = {"backends": ["reference"] * 3, "reasons": dict.fromkeys(_PASSES, refusal)}
            continue
        query, with_scores = _query(layer, shape, dtype), isinstance(layer, MaskedConv2d | MaskedLinear)
        chosen = choose_training(query, machine, with_scores=with_scores)
        reasons = {name: getattr(chosen, name).reason for name in _PASSES}
        found[name] = {"backends": list(chosen.backends), "reasons": reasons}
    return found


def set_backends(network: nn.Module, backends: Mapping[str, Mapping[str, Any]] | str) -> None:
    """Tell every masked and sparse layer who computes its passes: as chosen by name, or one for all.

    One for all is for channel masks too; of those nothing needs choosing otherwise.

    Raises:
        ValueError: a layer that nothing was chosen for.
    """
    for name, layer in _trained_layers(network).items():
        if isinstance(backends, str):
            layer.backends = backends
        elif name in backends:
            forward, input_gradient, weight_gradient = backends[name]["backends"]
            layer.backends = forward, input_gradient, weight_gradient
        else:
            raise ValueError(f"set_backends: expected a choice for {name!r}, got {sorted(backends)}")
    for module in network.modules():
        if isinstance(module, ChannelMask) and isinstance(backends, str):
            module.backend = backends


def _trained_layers(network: nn.Module) -> dict[str, _Trained]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _Trained)}


def _why_dense(layer: nn.Module) -> str | None:
    """Why only torch's dense layers can compute under this mask; None where the kernels can."""
    if not isinstance(layer, MaskedConv2d | MaskedLinear):
        return None
    if not isinstance(layer.pattern, Unstructured | Block | NM):
        return f"dense: no kernel knows masks of pattern {layer.pattern.spec}"
    return why_not(layer.pattern, ConvGeometry.from_module(layer))


def _query(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> LayerQuery:
    """Of a masked layer, as if what its mask keeps were packed."""
    image = shape if len(shape) == 4 else (math.prod(shape[:-1]), shape[-1], 1, 1)
    if isinstance(layer, SparseConv2d | SparseLinear):
        return query_of(layer.geometry, image, layer.values, dtype)
    assert isinstance(layer, MaskedConv2d | MaskedLinear)
    block = (layer.pattern.bk, layer.pattern.bc) if isinstance(layer.pattern, Block) else ()
    sizes = (int(layer.mask.sum()), *block)
    return query_of_kept(ConvGeometry.from_module(layer), image, sizes, layer.weight, dtype)


@torch.no_grad()
def _input_shapes(predictor: Predictor, images: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What each trained layer is given; the network is run once, in evaluation mode, and left as it was."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    names: dict[nn.Module, str] = {layer: name for name, layer in _trained_layers(predictor.network).items()}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        shapes[names[layer]] = tuple(x.shape), predictor.dtype or x.dtype

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    was_training = predictor.training
    try:
        Predictor.compute(predictor.eval(), images, False)
    finally:
        predictor.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes
