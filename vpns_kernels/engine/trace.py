"""What does a network compute? Its operations as torch.export sees them, for any batch size.

The graph is functional: no operation writes over its input, batch norms are in evaluation mode, and weights
are looked up by the name that they have in the network.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.export.graph_signature import ExportGraphSignature, OutputKind

from vpns_kernels.convert import densify, freeze, mask_modules
from vpns_kernels.copying import cast_floats, copy_network
from vpns_kernels.formats import unpack
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear
from vpns_kernels.tracing import check_evaluating

aten = torch.ops.aten
# What makes a tensor of nothing.
_MAKERS = (aten.full.default, aten.arange.default, aten.arange.start_step, aten.scalar_tensor.default)


class TraceError(ValueError):
    """A network that cannot be followed; the message names the place."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A network's operations.

    Args:
        graph: aten operations in order; its first tensor input is the images.
        tensors: weights, buffers, and what is computed of them alone, by the name of their node.
        names: of the same nodes, their name in the network; of what is computed, that of its first input.
        masks: what is kept of a layer's weight, where the network says so, by the layer's name.
        images: the node of the input.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    names: dict[str, str]
    masks: dict[str, Tensor]
    images: fx.Node

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU where there are none."""
        return next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))

    def without_values(self) -> Traced:
        """The same with tensors that have sizes and types alone."""
        meta = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        masks = {name: mask.to("meta") for name, mask in self.masks.items()}
        return replace(self, tensors=meta, masks=masks)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node's result is [N, C] or [N, C, H, W], floating, for the batch's N."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() not in (2, 4) or not value.is_floating_point():
            return False
        batch = self.images.meta["val"].shape[0]
        is_fixed = all(isinstance(extent, int) and extent > 0 for extent in value.shape[1:])
        return is_fixed and str(value.shape[0]) == str(batch)


def is_computed(node: fx.Node) -> bool:
    """Whether the node computes activations, not sizes."""
    value = node.meta.get("val")
    return value is None or isinstance(value, Tensor | tuple | list)


def place_of(node: fx.Node) -> str:
    """The module that an operation stands in."""
    stack = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return next((name for name in reversed(stack) if name), node.name)


def trace_network(model: nn.Module, example: Tensor) -> Traced:
    """Trace a network in evaluation mode.

    Args:
        example: [N, C, H, W]; height and width are fixed by it, the batch size is not.

    Raises:
        ValueError: a module in training mode.
        TraceError: torch.export cannot follow the network, or it returns anything but one tensor, or
            remembers something from call to call; the reason, and where.
    """
    if isinstance(model, nn.DataParallel | OptimizedModule):
        # What these wrap is the network.
        model = model.module if isinstance(model, nn.DataParallel) else model._orig_mod
    check_evaluating("compile", model)
    plain, masks = _plain(model)
    # With one image, torch.export would take the batch size for a constant.
    images = torch.zeros(max(2, len(example)), *example.shape[1:], dtype=example.dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            dynamic = ({0: torch.export.Dim("batch", max=1 << 16)},)
            exported = torch.export.export(plain, (images,), dynamic_shapes=dynamic)
            returned = exported.call_spec.out_spec
            exported = exported.run_decompositions({})
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3])[:400] or type(error).__name__
        if "Constraints violated (batch)" in reason:
            reason = "it takes the number of images for a constant, as len(x) does (x.shape[0] stays open)"
        place = _find_place(error, plain)
        message = f"compile: expected a network that torch.export can follow, got{place}: {reason}"
        raise TraceError(message) from error
    if returned is None or not returned.is_leaf():
        raise TraceError(f"compile: expected a network that returns one tensor, got {_describe(returned)}")
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored = {**exported.constants, **exported.state_dict}
    tensors = {key: stored.get(name) for key, name in names.items()}
    for key, name in signature.inputs_to_lifted_tensor_constants.items():
        names[key], tensors[key] = name, exported.constants[name]
    found = {key: tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    graph = exported.graph
    _drop_writes(graph, signature)
    # Operations have no effects; what nobody reads are checks of sizes that hold for these images.
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    _compute_constants(graph, found, names)
    _check_memory(graph, signature)
    images = next(node for node in graph.nodes if node.op == "placeholder" and node.name not in names)
    return Traced(graph, found, names, masks, images)


def _describe(returned: Any) -> str:
    """What a network returns, from the tree of its outputs."""
    if returned is None:
        return "nothing"
    keys = f" with keys {returned.context}" if returned.type is dict else f" of {returned.num_leaves}"
    return f"{returned.type.__name__}{keys} (compile a module that returns the one you need)"


def _drop_writes(graph: fx.Graph, signature: ExportGraphSignature) -> None:
    """Results that would be written over inputs and buffers: an engine leaves both as they are."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = zip(signature.output_specs, output.args[0], strict=True)
    kept = tuple(result for spec, result in results if spec.kind == OutputKind.USER_OUTPUT)
    if not all(isinstance(result, fx.Node) for result in kept):
        raise TraceError(f"compile: expected a network that returns one tensor, got {kept[0]}")
    output.args = (kept,)


def _check_memory(graph: fx.Graph, signature: ExportGraphSignature) -> None:
    """Refuse a network whose results hang on a buffer that each call writes over."""
    written = set(signature.buffers_to_mutate.values())
    for node in graph.nodes:
        name = signature.inputs_to_buffers.get(node.name)
        if node.op == "placeholder" and name in written and node.users:
            raise TraceError(
                "compile: expected a network that gives an image the same result at each call, got one that "
                f"writes over its buffer {name!r} and reads it"
            )


def _find_place(error: BaseException, network: nn.Module) -> str:
    """The innermost module whose code was running when an error was raised, and the line of that code."""
    names = {module: name for name, module in network.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_locals.get("self")
        # Every module is called through a line of torch's own.
        if isinstance(module, nn.Module) and module in names and "_call_impl" not in frame.f_code.co_name:
            file = Path(frame.f_code.co_filename).name
            found = f" at {names[module]!r} ({type(module).__name__}, {file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _compute_constants(graph: fx.Graph, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """What depends on weights alone, such as a weight under the mask of torch.nn.utils.prune."""
    for node in graph.nodes:
        inputs = node.all_input_nodes
        is_constant = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        is_constant = is_constant and all(source.name in tensors for source in inputs)
        if not is_constant or not (inputs or node.target in _MAKERS):
            continue
        called: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: tensors[source.name])
        with torch.no_grad():
            tensors[node.name] = called(*args, **kwargs)
        names[node.name] = names[inputs[0].name] if inputs else node.name


def _plain(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """torch's own layers, in float32 on the CPU, and what sparse ones keep."""
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseConv2d | SparseLinear)}
    masks = {name: _find_kept(layer) for name, layer in sparse.items()}
    plain = freeze(model) if mask_modules(model) else densify(model) if sparse else copy_network(model)
    return cast_floats(plain.cpu(), torch.float32), masks


def _find_kept(layer: SparseConv2d | SparseLinear) -> Tensor:
    """True where a weight is stored, be it zero or not."""
    return (unpack(torch.ones_like(layer.values), layer.layout, layer.geometry) != 0).cpu()
