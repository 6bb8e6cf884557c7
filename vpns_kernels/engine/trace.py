"""What does a network compute? Its operations as torch.export sees them, for any batch size.

The graph is functional: no operation writes over its input, batch norms are in evaluation mode, and weights
are looked up by the name that they have in the network.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vpns_kernels.convert import densify, freeze, mask_modules
from vpns_kernels.formats import unpack
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear


class TraceError(ValueError):
    """A network that cannot be followed; the message names the place."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A network's operations.

    Args:
        graph: aten operations in order; its first tensor input is the images.
        tensors: weights and buffers by the name of their placeholder.
        names: the same by their name in the network.
        masks: what is kept of a layer's weight, where the network says so, by the layer's name.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    names: dict[str, str]
    masks: dict[str, Tensor]


def trace_network(model: nn.Module, example: Tensor) -> Traced:
    """Trace a network in evaluation mode.

    Args:
        example: [N, C, H, W]; height and width are fixed by it, the batch size is not.

    Raises:
        ValueError: a module in training mode.
        TraceError: torch.export cannot follow the network; the reason, and where.
    """
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(f"compile: expected evaluation mode, got training at {training[0]!r} (call .eval())")
    plain, masks = _plain(model)
    # With one image, torch.export would take the batch size for a constant.
    images = torch.zeros(max(2, len(example)), *example.shape[1:], dtype=example.dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            dynamic = ({0: torch.export.Dim("batch", max=1 << 16)},)
            exported = torch.export.export(plain, (images,), dynamic_shapes=dynamic)
            exported = exported.run_decompositions({})
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3])[:400] or type(error).__name__
        message = f"compile: expected a network that torch.export can follow, got: {reason}"
        raise TraceError(message) from error
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored = {**exported.constants, **exported.state_dict}
    tensors = {key: stored.get(name) for key, name in names.items()}
    for key, name in signature.inputs_to_lifted_tensor_constants.items():
        names[key], tensors[key] = name, exported.constants[name]
    found = {key: tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    return Traced(exported.graph, found, names, masks)


def _plain(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """torch's own layers, in float32 on the CPU, and what sparse ones keep."""
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseConv2d | SparseLinear)}
    masks = {name: _find_kept(layer) for name, layer in sparse.items()}
    plain = freeze(model) if mask_modules(model) else densify(model) if sparse else copy.deepcopy(model)
    return plain.to(device="cpu", dtype=torch.float32), masks


def _find_kept(layer: SparseConv2d | SparseLinear) -> Tensor:
    """True where a weight is stored, be it zero or not."""
    return unpack(torch.ones_like(layer.values), layer.layout, layer.geometry) != 0
