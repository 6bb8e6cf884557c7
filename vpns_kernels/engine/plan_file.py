"""How does a plan lie in plan.bin? As tables and tensors that C++ reads without a library, and Python here.

All numbers are little-endian and unsigned; all sizes are in bytes. The file is, without gaps:

    header   96 bytes
    steps   112 bytes each
    values   32 bytes each
    tensors  64 bytes each
    names    UTF-8, without terminators
    data     of each tensor in turn, each starting at the next multiple of 64; the bytes skipped are 0

    header:  0 magic "VPNSPLAN" | 8 u32 version, 3 | 12 u32 steps | 16 u32 tensors | 20 u32 values
             24 u64 size of the file | 32 u64 offset of steps, 96 | 40 of values | 48 of tensors | 56 of names
             64 u64 size of names | 72 u32 value that is the input | 76 the output
             80 u32 images that a thread takes at a time | 84 u32 1 where the output is [N, C]
             88 u32 0, twice
    step:    0 u32 offset in names, 4 u32 size: its name, unique
             8, 12: its pattern, such as "block:32x32", empty without weights | 16, 20: its kernel, or empty
             24 u32 op, by its place in plan.Op | 28 u32 flags: 1 native, 2 has a bias, 4 counts padding,
                8 has a constant
             32 u32 index of its first tensor | 36 u32 how many tensors
             40 u32 value it reads | 44 residual | 48 value it writes | 52 u32 from which channel on
             56 u32 activation, by its place in plan.PLAN_ACTS | 60 u32 input channels | 64 output channels
             68 kernel height, 72 width | 76 stride, 2 numbers | 84 padding, 2 | 92 dilation, 2
             100 groups | 104 u32 first channel that a copy reads | 108 u32 how many steps
                from this one on run together by strips of rows, or 0
    value:   0 u32 channels | 4 height | 8 width | 12 u32 dtype as of tensors | 16 u32 0, four times
    tensor:  0 u32 offset in names, 4 u32 size: "<step>.<part>"
             8 u32 dtype: 1 float32, 2 bfloat16, 3 float64, 4 int32, 5 float16 | 12 u32 rank, at most 4
             16 u64 shape, 4 numbers, those beyond the rank 0 | 48 u64 offset in the file | 56 u64 size

A value that is none is 2^32 - 1. A plan without values holds layers alone and cannot be run. A step's tensors
are `values`, then by the rank of values (see formats.Packed) 1 or 3: `indptr`, `index`, `indptr_t`,
`index_t`, `permutation`; 4: `kept_out`, `kept_in`; then, where flagged, `bias` [K] and `constant`
[P, Q, K], of its output's dtype. Values and bias are of
floating dtypes, the rest int32. Names follow one another as they are used: name, pattern and kernel of each
step, then each tensor's. So every offset follows from the numbers before it, and a reader refuses a file in
which one differs, before it follows it; then it checks the layout (formats.validate says how). A step that is
not native needs torch: a C++ program refuses the plan and names the step, or runs one segment of it (native
steps between two of torch's; what passes between them are values). A step of torch has values where it reads
or writes one; more than one pair are in as many steps side by side. The dense weight of a step, its ragged
blocks filled up, has fewer than 2^31 entries, and so has each tensor.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.layer import LIMIT, PlanLayer
from vpns_kernels.engine.plan import OPS, PLAN_ACTS, Plan, PlanStep, PlanValue
from vpns_kernels.formats import Packed
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import parse_pattern

_MAGIC, _VERSION, _NONE = b"VPNSPLAN", 3, 2**32 - 1
_HEADER, _STEP = struct.Struct("<8s4I6Q6I"), struct.Struct("<28I")
_VALUE, _TENSOR = struct.Struct("<8I"), struct.Struct("<4I6Q")
_NATIVE, _HAS_BIAS, _COUNTS_PADDING, _HAS_CONSTANT = 1, 2, 4, 8
_LEAST_CHUNK, _MOST_CHUNK = 1, 4096
_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float64, 4: torch.int32, 5: torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX_PARTS = ("indptr", "index", "indptr_t", "index_t", "permutation")
_PARTS = {1: _INDEX_PARTS, 3: _INDEX_PARTS, 4: ("kept_out", "kept_in")}


def encode_plan(plan: Plan) -> Iterator[bytes | memoryview]:
    """The bytes of plan.bin, piece by piece."""
    _check_byte_order()
    parts = [_parts_of(step) for step in plan.steps]
    tensors = [
        (f"{step.name}.{name}", tensor)
        for step, found in zip(plan.steps, parts, strict=True)
        for name, tensor in found
    ]
    values_start = _HEADER.size + _STEP.size * len(plan.steps)
    tensors_start = values_start + _VALUE.size * len(plan.values)
    names_start = tensors_start + _TENSOR.size * len(tensors)
    names, steps, first = bytearray(), bytearray(), 0
    together = dict(plan.strips)
    for place, (step, found) in enumerate(zip(plan.steps, parts, strict=True)):
        steps += _encode_step(step, names, first, len(found), together.get(place, 0))
        first += len(found)
    values = b"".join(
        _VALUE.pack(v.channels, v.height, v.width, _CODES[v.dtype], 0, 0, 0, 0) for v in plan.values
    )
    references = [_add(names, name) for name, _ in tensors]
    table, place = bytearray(), names_start + len(names)
    for reference, (_, tensor) in zip(references, tensors, strict=True):
        place = _align(place)
        shape = (*tensor.shape, 0, 0, 0, 0)[:4]
        table += _TENSOR.pack(*reference, _CODES[tensor.dtype], tensor.dim(), *shape, place, tensor.nbytes)
        place += tensor.nbytes
    counts = (len(plan.steps), len(tensors), len(plan.values))
    places = (_HEADER.size, values_start, tensors_start, names_start, len(names))
    ends = (_index(plan.input), _index(plan.output), plan.chunk, plan.is_flat, 0, 0)
    yield _HEADER.pack(_MAGIC, _VERSION, *counts, place, *places, *ends)
    yield from (bytes(steps), values, bytes(table), bytes(names))
    place = names_start + len(names)
    for _, tensor in tensors:
        yield bytes(_align(place) - place)
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        place = _align(place) + tensor.nbytes


def _encode_step(step: PlanStep, names: bytearray, first: int, count: int, together: int) -> bytes:
    g, layer = step.geometry, step.layer
    pattern = "" if layer is None else layer.packed.pattern.spec
    strings = (*_add(names, step.name), *_add(names, pattern), *_add(names, step.kernel))
    flags = _NATIVE * step.native | _COUNTS_PADDING * step.counts_padding
    flags |= _HAS_CONSTANT * (step.constant is not None)
    flags |= _HAS_BIAS * (layer is not None and layer.bias is not None)
    ends = (_index(step.x), _index(step.residual), _index(step.output), step.first_channel)
    sizes = (g.in_channels, g.out_channels, *g.kernel_size, *g.stride, *g.padding, *g.dilation, g.groups)
    numbers = (OPS.index(step.op), flags, first, count, *ends, PLAN_ACTS.index(step.act))
    return _STEP.pack(*strings, *numbers, *sizes, step.read_channel, together)


def decode_plan(data: Tensor, path: Path) -> Plan:
    """The plan of a plan.bin; its tensors are views of `data`.

    Args:
        data: uint8 [size of the file].
        path: for messages.

    Raises:
        ArtifactError: anything that encode_plan would not have written.
    """
    _check_byte_order()
    try:
        return _Reader(data).read_plan()
    except ValueError as error:
        raise ArtifactError(f"read_artifact: {path}: {error}") from error


class _Reader:
    """Walks a plan from front to back; ValueError where a number is not the only one possible."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._bytes = data, data.numpy().data
        _expect("at least the header's size", len(self._bytes) >= _HEADER.size, len(self._bytes))
        magic, version, *counts, size, steps, values, tensors, names, names_bytes = _HEADER.unpack_from(
            self._bytes
        )[:11]
        self._ends = _HEADER.unpack_from(self._bytes)[11:]
        self._steps, self._tensors, self._values = counts
        _expect(f"magic {_MAGIC!r}", magic == _MAGIC, magic)
        hint = "newer than this reader" if version > _VERSION else "older: compile and save it again"
        _expect(f"version {_VERSION}", version == _VERSION, f"{version} ({hint})")
        _expect(f"a size of {len(self._bytes)}", size == len(self._bytes), size)
        self._values_start = _HEADER.size + _STEP.size * self._steps
        self._tensors_start = self._values_start + _VALUE.size * self._values
        self._names_start = self._tensors_start + _TENSOR.size * self._tensors
        expected = [_HEADER.size, self._values_start, self._tensors_start, self._names_start]
        found = [steps, values, tensors, names]
        _expect(f"tables at {expected} and 0 reserved", found == expected and not any(self._ends[4:]), found)
        self._names_bytes = names_bytes
        self._data_place = self._names_start + self._names_bytes
        _expect(f"tables within {size} bytes", self._data_place <= size, self._data_place)
        self._names_used = 0
        self._tensors_used = 0

    def read_plan(self) -> Plan:
        records = list(_STEP.iter_unpack(self._bytes[_HEADER.size : self._values_start]))
        strings = [[self._take_name(*record[i : i + 2]) for i in (0, 2, 4)] for record in records]
        values = tuple(
            self._read_value(*record)
            for record in _VALUE.iter_unpack(self._bytes[self._values_start : self._tensors_start])
        )
        steps = tuple(
            self._read_step(name, spec, kernel, record[6:], values)
            for (name, spec, kernel), record in zip(strings, records, strict=True)
        )
        used = (self._tensors_used, self._names_used, self._data_place)
        expected = (self._tensors, self._names_bytes, len(self._bytes))
        _expect(f"tensors, names and data up to {expected}", used == expected, used)
        chunk = self._ends[2]
        _expect(f"{_LEAST_CHUNK} to {_MOST_CHUNK} images", _LEAST_CHUNK <= chunk <= _MOST_CHUNK, chunk)
        _expect("0 or 1 for a flat output", self._ends[3] <= 1, self._ends[3])
        ends = self._read_index(self._ends[0]), self._read_index(self._ends[1])
        strips = tuple((place, record[-1]) for place, record in enumerate(records) if record[-1])
        return Plan(steps, values, *ends, chunk, bool(self._ends[3]), strips)

    def _read_value(self, channels: int, height: int, width: int, code: int, *zeros: int) -> PlanValue:
        sizes = (channels, height, width)
        is_fit = min(sizes) >= 1 and math.prod(sizes) < LIMIT and code in _DTYPES and not any(zeros)
        _expect("sizes and dtype of a value", is_fit, (*sizes, code, *zeros))
        return PlanValue(channels, height, width, _DTYPES[code])

    def _read_index(self, index: int) -> int | None:
        is_fit = index == _NONE or index < self._values
        _expect(f"a value below {self._values} or none", is_fit, index)
        return None if index == _NONE else index

    def _read_step(
        self, name: str, spec: str, kernel: str, record: tuple[int, ...], values: tuple[PlanValue, ...]
    ) -> PlanStep:
        op, flags, first, count, x, residual, output, channel, act, *sizes = record
        in_channels, out_channels, *pairs, groups, read_channel, _ = sizes
        is_fit = op < len(OPS) and flags < 16 and act < len(PLAN_ACTS)
        is_fit = is_fit and (read_channel == 0 or OPS[op] == "copy")
        _expect(f"op, flags and reserved of {name}", is_fit, (op, flags, act, read_channel))
        _expect(f"first tensor {self._tensors_used} of {name}", first == self._tensors_used, first)
        ends = self._read_index(x), self._read_index(residual), self._read_index(output)
        is_fit = (ends[0] is None) == (ends[2] is None) == (self._values == 0) or OPS[op] == "torch"
        _expect(f"ends of {name}", is_fit, ends)
        kernel_size, stride, padding, dilation = zip(pairs[::2], pairs[1::2], strict=True)
        geometry = ConvGeometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        layer = None
        has_bias, is_native = bool(flags & _HAS_BIAS), bool(flags & _NATIVE)
        if OPS[op] in ("conv2d", "linear"):
            layer = self._read_layer(name, OPS[op], spec, geometry, has_bias, is_native)
        else:
            is_fit = spec == "" and not flags & (_HAS_BIAS | _HAS_CONSTANT)
            _expect(f"no weights of {name}", is_fit and is_native == (OPS[op] != "torch"), (spec, flags))
        constant = None
        if flags & _HAS_CONSTANT:
            constant = self._take_tensor(f"{name}.constant")
            is_fit = ends[2] is not None and _is_like(constant, values[ends[2]])
            _expect(f"a constant of {name} like its output", is_fit, list(constant.shape))
        _expect(f"{self._tensors_used - first} tensors of {name}", count == self._tensors_used - first, count)
        counts = bool(flags & _COUNTS_PADDING)
        return PlanStep(
            name,
            OPS[op],
            geometry,
            layer,
            kernel,
            *ends,
            channel,
            PLAN_ACTS[act],
            counts,
            read_channel,
            constant,
        )

    def _read_layer(
        self, name: str, op: str, spec: str, geometry: ConvGeometry, has_bias: bool, is_native: bool
    ) -> PlanLayer:
        values = self._take_tensor(f"{name}.values")
        _expect(f"rank of values of {name} in {sorted(_PARTS)}", values.dim() in _PARTS, values.dim())
        layout = tuple(self._take_tensor(f"{name}.{part}") for part in _PARTS[values.dim()])
        bias = self._take_tensor(f"{name}.bias") if has_bias else None
        pattern = parse_pattern(spec)
        _expect(f"pattern {pattern.spec!r} of {name}", spec == pattern.spec, repr(spec))
        packed = Packed(values, layout, pattern, geometry)
        try:
            return PlanLayer(name, op, packed, bias, is_native)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    def _take_name(self, offset: int, size: int) -> str:
        _expect(f"a name at {self._names_used}", offset == self._names_used, offset)
        self._names_used += size
        _expect(
            f"names of {self._names_bytes} bytes", self._names_used <= self._names_bytes, self._names_used
        )
        start = self._names_start + offset
        return bytes(self._bytes[start : start + size]).decode()

    def _take_tensor(self, name: str) -> Tensor:
        _expect(f"{name}, a tensor more than {self._tensors}", self._tensors_used < self._tensors, "none")
        record = self._tensors_start + _TENSOR.size * self._tensors_used
        where, length, code, rank, *shape, offset, size = _TENSOR.unpack_from(self._bytes, record)
        self._tensors_used += 1
        found = self._take_name(where, length)
        _expect(f"tensor {name}", found == name, found)
        is_fit = (
            code in _DTYPES
            and rank <= 4
            and not any(shape[rank:])
            and math.prod(max(1, extent) for extent in shape) < LIMIT
        )
        _expect(f"dtype, rank and shape of {name}", is_fit, (code, rank, shape))
        dtype, shape = _DTYPES[code], shape[:rank]
        start = _align(self._data_place)
        is_fit = (
            offset == start and size == math.prod(shape) * dtype.itemsize and start + size <= len(self._bytes)
        )
        _expect(f"{name} {dtype} {shape} at {start}, within the file", is_fit, f"{size} bytes at {offset}")
        _expect(f"zeros before {name}", not any(self._bytes[self._data_place : start]), "others")
        self._data_place = start + size
        return self._data[start : start + size].view(dtype).view(shape)


def _parts_of(step: PlanStep) -> list[tuple[str, Tensor]]:
    if step.layer is None:
        return []
    packed = step.layer.packed
    parts = zip(("values", *_PARTS[packed.values.dim()]), (packed.values, *packed.layout), strict=True)
    others = (("bias", step.layer.bias), ("constant", step.constant))
    return [*parts, *((name, tensor) for name, tensor in others if tensor is not None)]


def _is_like(constant: Tensor, value: PlanValue) -> bool:
    shape = (value.height, value.width, value.channels)
    return (tuple(constant.shape), constant.dtype) == (shape, value.dtype)


def _index(value: int | None) -> int:
    return _NONE if value is None else value


def _add(names: bytearray, name: str) -> tuple[int, int]:
    """Offset and size of a name that is put behind the others."""
    encoded, offset = name.encode(), len(names)
    names += encoded
    return offset, len(encoded)


def _align(place: int) -> int:
    return -(-place // 64) * 64


def _expect(what: str, is_so: bool, found: object) -> None:
    if not is_so:
        raise ValueError(f"expected {what}, got {found}")


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("plan.bin: expected a little-endian machine, got a big-endian one")
