"""What stands in plan.bin? The layers of a network with their packed weights, readable without a library.

All numbers are little-endian and unsigned; all sizes are in bytes. The file is, without gaps:

    header   64 bytes
    steps    80 bytes each
    tensors  64 bytes each
    names    UTF-8, without terminators
    data     of each tensor in turn, each starting at the next multiple of 64; the bytes skipped are 0

    header:  0 magic "VPNSPLAN" | 8 u32 version, 1 | 12 u32 steps | 16 u32 tensors | 20 u32 0
             24 u64 size of the file | 32 u64 offset of steps, 64 | 40 u64 offset of tensors
             48 u64 offset of names | 56 u64 size of names
    step:    0 u32 offset in names, 4 u32 size: its name, unique
             8 u32 offset in names, 12 u32 size: its pattern, such as "block:32x32"
             16 u32 op: 0 conv2d, 1 linear | 20 u32 flags: 1 native, 2 has a bias; others 0
             24 u32 index of its first tensor | 28 u32 how many tensors
             32 u32 input channels | 36 output channels | 40 kernel height, 44 width | 48 stride, 2 numbers
             56 padding, 2 | 64 dilation, 2 | 72 groups | 76 u32 0
    tensor:  0 u32 offset in names, 4 u32 size: "<step>.<part>"
             8 u32 dtype: 1 float32, 2 bfloat16, 3 float64, 4 int32, 5 float16 | 12 u32 rank, at most 4
             16 u64 shape, 4 numbers, those beyond the rank 0 | 48 u64 offset in the file | 56 u64 size

A step's tensors are `values`, then by the rank of values (see formats.Packed) 1 or 3: `indptr`, `index`,
`indptr_t`, `index_t`, `permutation`; 4: `kept_out`, `kept_in`; then `bias` [K] where flagged. Values and
bias are of floating dtypes, the rest int32. Names follow one another as they are used: name and pattern of
each step, then each tensor's. So every offset follows from the numbers before it, and a reader refuses a
file in which one differs, before it follows it; then it checks the layout (formats.validate says how). A
step that is not native needs torch: a C++ program refuses the plan and names the step. The dense weight of
a step, its ragged blocks filled up, has fewer than 2^31 entries, and so has each tensor.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.layer import LIMIT, OPS, PlanLayer
from vpns_kernels.formats import Packed
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.patterns import parse_pattern

_MAGIC, _VERSION = b"VPNSPLAN", 1
_HEADER, _STEP, _TENSOR = struct.Struct("<8s4I5Q"), struct.Struct("<20I"), struct.Struct("<4I6Q")
_NATIVE, _HAS_BIAS = 1, 2
_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float64, 4: torch.int32, 5: torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX_PARTS = ("indptr", "index", "indptr_t", "index_t", "permutation")
_PARTS = {1: _INDEX_PARTS, 3: _INDEX_PARTS, 4: ("kept_out", "kept_in")}


def encode_plan(layers: Sequence[PlanLayer]) -> Iterator[bytes | memoryview]:
    """The bytes of plan.bin, piece by piece."""
    _check_byte_order()
    check_names(layers)
    parts = [_parts_of(layer) for layer in layers]
    tensors = [
        (f"{layer.name}.{name}", t) for layer, found in zip(layers, parts, strict=True) for name, t in found
    ]
    steps_end = _HEADER.size + _STEP.size * len(layers)
    names_start = steps_end + _TENSOR.size * len(tensors)
    names, steps, first = bytearray(), bytearray(), 0
    for layer, found in zip(layers, parts, strict=True):
        g = layer.packed.geometry
        strings = (*_add(names, layer.name), *_add(names, layer.packed.pattern.spec))
        flags = _NATIVE * layer.native | _HAS_BIAS * (layer.bias is not None)
        sizes = (g.in_channels, g.out_channels, *g.kernel_size, *g.stride, *g.padding, *g.dilation, g.groups)
        steps += _STEP.pack(*strings, OPS.index(layer.op), flags, first, len(found), *sizes, 0)
        first += len(found)
    references = [_add(names, name) for name, _ in tensors]
    table, place = bytearray(), names_start + len(names)
    for reference, (_, tensor) in zip(references, tensors, strict=True):
        place = _align(place)
        shape = (*tensor.shape, 0, 0, 0, 0)[:4]
        table += _TENSOR.pack(*reference, _CODES[tensor.dtype], tensor.dim(), *shape, place, tensor.nbytes)
        place += tensor.nbytes
    places = (_HEADER.size, steps_end, names_start, len(names))
    yield _HEADER.pack(_MAGIC, _VERSION, len(layers), len(tensors), 0, place, *places)
    yield from (bytes(steps), bytes(table), bytes(names))
    place = names_start + len(names)
    for _, tensor in tensors:
        yield bytes(_align(place) - place)
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        place = _align(place) + tensor.nbytes


def check_names(layers: Sequence[PlanLayer]) -> None:
    """ValueError where two layers have one name."""
    counts = Counter(layer.name for layer in layers)
    if doubles := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"plan: expected unique layer names, got {doubles} more than once")


def decode_plan(data: Tensor, path: Path) -> tuple[PlanLayer, ...]:
    """The layers of a plan.bin; their tensors are views of `data`.

    Args:
        data: uint8 [size of the file].
        path: for messages.

    Raises:
        ArtifactError: anything that encode_plan would not have written.
    """
    _check_byte_order()
    try:
        return _Reader(data).read_layers()
    except ValueError as error:
        raise ArtifactError(f"read_artifact: {path}: {error}") from error


class _Reader:
    """Walks a plan from front to back; ValueError where a number is not the only one possible."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._bytes = data, data.numpy().data
        _expect("at least the header's size", len(self._bytes) >= _HEADER.size, len(self._bytes))
        magic, version, self._steps, self._tensors, zero, size, *places = _HEADER.unpack_from(self._bytes)
        _expect(f"magic {_MAGIC!r}", magic == _MAGIC, magic)
        _expect(f"version {_VERSION}", version == _VERSION, f"{version} (newer than this reader?)")
        _expect(f"a size of {len(self._bytes)}", size == len(self._bytes), size)
        self._tensors_start = _HEADER.size + _STEP.size * self._steps
        self._names_start = self._tensors_start + _TENSOR.size * self._tensors
        expected = [_HEADER.size, self._tensors_start, self._names_start]
        _expect(
            f"tables at {expected} and 0 reserved", places[:3] == expected and zero == 0, [*places[:3], zero]
        )
        self._names_bytes = places[3]
        self._data_place = self._names_start + self._names_bytes
        _expect(f"tables within {size} bytes", self._data_place <= size, self._data_place)
        self._names_used = 0
        self._tensors_used = 0

    def read_layers(self) -> tuple[PlanLayer, ...]:
        records = list(_STEP.iter_unpack(self._bytes[_HEADER.size : self._tensors_start]))
        strings = [(self._take_name(*record[:2]), self._take_name(*record[2:4])) for record in records]
        layers = tuple(
            self._read_step(name, spec, record[4:])
            for (name, spec), record in zip(strings, records, strict=True)
        )
        check_names(layers)
        used = (self._tensors_used, self._names_used, self._data_place)
        expected = (self._tensors, self._names_bytes, len(self._bytes))
        _expect(f"tensors, names and data up to {expected}", used == expected, used)
        return layers

    def _read_step(self, name: str, spec: str, record: tuple[int, ...]) -> PlanLayer:
        op, flags, first, count, in_channels, out_channels, *pairs, groups, zero = record
        _expect(
            f"op, flags and reserved of {name}", op < len(OPS) and flags < 4 and zero == 0, (op, flags, zero)
        )
        _expect(f"first tensor {self._tensors_used} of {name}", first == self._tensors_used, first)
        values = self._take_tensor(f"{name}.values")
        _expect(f"rank of values of {name} in {sorted(_PARTS)}", values.dim() in _PARTS, values.dim())
        layout = tuple(self._take_tensor(f"{name}.{part}") for part in _PARTS[values.dim()])
        bias = self._take_tensor(f"{name}.bias") if flags & _HAS_BIAS else None
        _expect(f"{self._tensors_used - first} tensors of {name}", count == self._tensors_used - first, count)
        pattern = parse_pattern(spec)
        _expect(f"pattern {pattern.spec!r} of {name}", spec == pattern.spec, repr(spec))
        kernel_size, stride, padding, dilation = zip(pairs[::2], pairs[1::2], strict=True)
        geometry = ConvGeometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        packed = Packed(values, layout, pattern, geometry)
        try:
            return PlanLayer(name, OPS[op], packed, bias, bool(flags & _NATIVE))
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


def _parts_of(layer: PlanLayer) -> list[tuple[str, Tensor]]:
    packed = layer.packed
    parts = zip(("values", *_PARTS[packed.values.dim()]), (packed.values, *packed.layout), strict=True)
    return [*parts, *([] if layer.bias is None else [("bias", layer.bias)])]


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
