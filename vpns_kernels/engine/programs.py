"""How does torch run what no native step computes? As programs of its operations, between native segments."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from vpns_kernels.copying import cast_floats
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine.program_file import check_program, strip_program
from vpns_kernels.engine.trace import Traced, is_computed, place_of

if TYPE_CHECKING:
    from vpns_kernels.engine.drafts import Lowering
    from vpns_kernels.engine.partition import Segment

aten = torch.ops.aten
_NAMED_REASONS = 3


@dataclass(frozen=True)
class Port:
    """What a program reads or writes.

    Args:
        value: of the plan; below 0: a tensor that only programs see, as it is.
        shape: without the first extent; of a value.
        strides: as the program expects it; of a value.
        dtype: as the program expects it; of a value.
    """

    value: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dtype: str = "float32"

    def fit(self, tensor: Tensor) -> Tensor:
        """A value as the program reads it."""
        if self.value < 0:
            return tensor
        found = tensor.reshape(-1, *self.shape) if tensor.shape[1:] != self.shape else tensor
        strides, dtype = found.stride(), getattr(torch, self.dtype)
        if found.dtype == dtype and all(
            extent == 1 or stride == wanted
            for extent, stride, wanted in zip(found.shape, strides, self.strides, strict=True)
        ):
            return found
        made = torch.empty_strided(tuple(found.shape), self.strides, dtype=dtype, device=found.device)
        return made.copy_(found)


@dataclass(frozen=True, eq=False)
class TorchProgram:
    """Operations that torch runs.

    Args:
        name: the module that they begin in.
        module: takes what `reads` says, returns a tuple of what `writes` says.
        note: which operations no native step computes, and where.
    """

    name: str
    module: nn.Module
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    note: str

    def cast(self, dtype: torch.dtype) -> TorchProgram:
        """The same with weights and values of another type."""
        name = dtype_name(dtype)
        reads = tuple(replace(port, dtype=name) for port in self.reads)
        return replace(self, module=cast_floats(copy.deepcopy(self.module), dtype), reads=reads)

    def run(self, tensors: dict[int, Tensor]) -> None:
        """Take what it reads from the tensors of a call, and put there what it writes."""
        with torch.no_grad():
            results = self.module(*(port.fit(tensors[port.value]) for port in self.reads))
        for port, result in zip(self.writes, results, strict=True):
            tensors[port.value] = result


def make_program(traced: Traced, segment: Segment, to: Lowering) -> TorchProgram:
    """The program of a segment; what native steps read of it becomes values.

    Args:
        to: knows the values that are there.
    """
    return _Maker(traced, segment, to).make()


class _Maker:
    """Copies a segment's operations, and what they need of sizes and weights, into a graph of its own."""

    def __init__(self, traced: Traced, segment: Segment, to: Lowering) -> None:
        self._traced, self._segment, self._to = traced, segment, to
        self._own = set(segment.nodes)
        self._graph, self._root = fx.Graph(), nn.Module()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._last_input: fx.Node | None = None

    def make(self) -> TorchProgram:
        for node in self._segment.nodes:
            self._copies[node] = self._copy(node)
        wanted = [node for node in self._segment.nodes if self._is_read_outside(node)]
        self._graph.output(tuple(self._copies[node] for node in wanted))
        module = fx.GraphModule(self._root, self._graph)
        reads = tuple(self._port(node) for node in self._inputs)
        for node in wanted:
            if self._traced.is_activation(node):
                self._to.set_value(node, self._to.add_value(node))
            else:
                self._to.add_side(node)
        writes = tuple(self._port(node) for node in wanted)
        refused = self._segment.reasons or dict.fromkeys(self._segment.nodes[:1], "between others of torch")
        reasons = list(dict.fromkeys(refused.values()))
        more = f"; and {len(reasons) - _NAMED_REASONS} more" if len(reasons) > _NAMED_REASONS else ""
        note = "; ".join(reasons[:_NAMED_REASONS]) + more
        first = next(iter(refused))
        return TorchProgram(f"torch:{place_of(first)}", module, reads, writes, note)

    def _is_read_outside(self, node: fx.Node) -> bool:
        readers = list(node.users)
        while readers:
            reader = readers.pop()
            if reader in self._segment.virtual:
                readers += reader.users
            elif reader not in self._own and (is_computed(reader) or reader.op == "output"):
                return True
        return False

    def _port(self, node: fx.Node) -> Port:
        value = self._to.find_value(node)
        if value < 0:
            return Port(value)
        found = node.meta["val"]
        return Port(value, tuple(found.shape[1:]), tuple(int(stride) for stride in found.stride()))

    def _copy(self, node: fx.Node) -> fx.Node:
        return self._graph.node_copy(node, self._find)

    def _find(self, node: fx.Node) -> fx.Node:
        """The copy of a node that another reads."""
        if node not in self._copies:
            self._copies[node] = self._bring(node)
        return self._copies[node]

    def _bring(self, node: fx.Node) -> fx.Node:
        if node.name in self._traced.tensors:
            name = f"tensor_{node.name}"
            self._root.register_buffer(name, self._traced.tensors[node.name].clone())
            return self._graph.get_attr(name)
        if node.target == aten.sym_size.int and node.args[1] == 0 and self._is_batch(node):
            source = next((n for n in self._inputs if self._traced.is_activation(n)), self._traced.images)
            return self._graph.call_function(aten.sym_size.int, (self._find(source), 0))
        if not is_computed(node) or node in self._segment.virtual:
            return self._copy(node)
        # Placeholders stand in front of everything, in their order.
        with self._graph.inserting_after(self._last_input):
            made = self._graph.placeholder(f"input_{node.name}")
        self._last_input = self._inputs[node] = made
        return made

    def _is_batch(self, node: fx.Node) -> bool:
        return str(node.meta["val"]) == str(self._traced.images.meta["val"].shape[0])


def export_program(program: TorchProgram, example: Sequence[Tensor], other: Sequence[Tensor]) -> bytes:
    """The program as torch.export stores it, read back and compared.

    Args:
        example: what it reads for some images.
        other: what it reads for another number of them.

    Raises:
        ValueError: torch.export cannot store it, or not for any batch.
    """
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in example)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(program.module, tuple(example), dynamic_shapes=dynamic)
            torch.export.save(exported, buffer)
    except Exception as error:
        raise ValueError(
            f"save: expected {program.name} to be stored by torch.export, got: {error}"
        ) from error
    stored = strip_program(buffer.getvalue())
    with torch.no_grad():
        found, expected = _load(stored)(*other), program.module(*other)
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
        raise ValueError(f"save: expected {program.name} to compute the same when it is read back")
    return stored


def describe_program(program: TorchProgram) -> dict[str, Any]:
    """JSON values, all but the operations themselves."""
    ports = {"reads": program.reads, "writes": program.writes}
    described = {key: [asdict(port) for port in value] for key, value in ports.items()}
    return {"name": program.name, "note": program.note} | described


def open_program(data: Tensor, described: dict[str, Any]) -> TorchProgram:
    """What export_program and describe_program stored.

    Raises:
        ValueError, KeyError, TypeError: something else.
    """
    reads, writes = (tuple(_open_port(port) for port in described[key]) for key in ("reads", "writes"))
    name, note = described["name"], described["note"]
    if not isinstance(name, str) or not isinstance(note, str):
        raise TypeError(f"expected a program's name and note, got {name!r} and {note!r}")
    try:
        module = _load(data.numpy().tobytes())
    except Exception as error:
        raise ValueError(f"expected the program {name} of torch.export, got: {error}") from error
    return TorchProgram(name, module, reads, writes, note)


def _load(data: bytes) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = torch.export.load(io.BytesIO(check_program(data))).module(check_guards=False)
    return module


def _open_port(described: dict[str, Any]) -> Port:
    value, shape, strides = described["value"], described["shape"], described["strides"]
    is_port = type(value) is int and all(type(n) is int for n in (*shape, *strides))
    if not is_port or described["dtype"] not in ("float32", "bfloat16"):
        raise TypeError(f"expected whole numbers and a dtype in a port, got {described}")
    return Port(value, tuple(shape), tuple(strides), described["dtype"])
