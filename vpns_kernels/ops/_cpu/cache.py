"""Which prepared forms of a packed weight are kept? Those used last, until the weight changes or is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vpns_kernels.formats import validate
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._cpu import prepared
from vpns_kernels.ops._cpu.prepared import Prepared

# Input shapes (and dtypes and thread counts) for which a weight is kept in its kernel's order.
_KEPT_SHAPES = 8

_Form = TypeVar("_Form")
# (values, layout, geometry, shape of x, dtype of x, kernel) → the form.
_Prepare = Callable[[Tensor, Sequence[Tensor], ConvGeometry, Sequence[int], torch.dtype, str], _Form]


class PreparedCache(Generic[_Form]):
    """The forms of one weight; any number of threads may ask. Never copied or saved with its owner.

    Args:
        prepare: makes a form; importable by name, so that an owner can be pickled.
        compares_values: at each call, with a copy. Otherwise a change of them through `.data` goes unnoticed,
            as one of the layout always does: it leaves no trace.
    """

    def __init__(self, prepare: _Prepare[_Form], compares_values: bool = False) -> None:
        self._prepare, self._compares_values = prepare, compares_values
        self._lock = Lock()
        self._made: _Made[_Form] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedCache[_Form]:
        return PreparedCache(self._prepare, self._compares_values)

    def __reduce__(self) -> tuple[type[PreparedCache[Any]], tuple[_Prepare[_Form], bool]]:
        return PreparedCache, (self._prepare, self._compares_values)

    def get(
        self, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, x: Tensor, kernel: str = ""
    ) -> _Form:
        """The form that takes x; a new layout is validated first."""
        args = (values, layout, geometry, x.shape, x.dtype, kernel)
        if any(tensor.is_inference() for tensor in (values, *layout)):
            # Made under inference_mode: changes leave no trace, so nothing may be kept.
            validate(values, layout, geometry)
            return self._prepare(*args)
        key = (x.shape, x.dtype, kernel, torch.get_num_threads())
        stamps = _stamp(values), values.shape, geometry, *map(_stamp, layout)
        with self._lock:
            made = self._made
            if made is not None and made.is_of(stamps, values):
                found = made.forms.get(key)
                if found is not None:
                    made.forms.move_to_end(key)
                    return found
            else:
                # Values that training changed still have the layout that was validated.
                if made is None or made.stamps[1:] != stamps[1:]:
                    validate(values, layout, geometry)
                storages = tuple(tensor.untyped_storage() for tensor in (values, *layout))
                copy = values.detach().clone() if self._compares_values else None
                made = self._made = _Made(stamps, storages, copy)
        # Outside the lock: other shapes need not wait. Two threads may prepare the same; one is kept.
        found = self._prepare(*args)
        with self._lock:
            found = made.forms.setdefault(key, found)
            made.forms.move_to_end(key)
            while len(made.forms) > _KEPT_SHAPES:
                made.forms.popitem(last=False)
        return found


@dataclass(frozen=True)
class _Made(Generic[_Form]):
    """Forms, least recently used first, and what they were made from.

    Holding on to the storages keeps their addresses from being given to others, so that equal stamps mean
    equal content.
    """

    stamps: tuple[object, ...]
    storages: tuple[object, ...]
    copy: Tensor | None
    forms: OrderedDict[tuple[object, ...], _Form] = field(default_factory=OrderedDict)

    def is_of(self, stamps: tuple[object, ...], values: Tensor) -> bool:
        return self.stamps == stamps and (self.copy is None or torch.equal(self.copy, values))


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor._version, tensor.dtype


# For calls of the op, which owns nothing: in a compiled or exported graph nobody else could keep the forms.
# They go when the tensor of values goes. Comparing costs little beside validating and preparing anew.
_CACHES = WeakTensorKeyDictionary()
_CACHES_LOCK = Lock()


def prepared_for(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, x: Tensor) -> Prepared:
    """The form of these values that takes x, kept as long as the values live."""
    with _CACHES_LOCK:
        cache: PreparedCache[Prepared] | None = _CACHES.get(values)
        if cache is None:
            cache = _CACHES[values] = PreparedCache(prepared.Prepared, compares_values=True)
    return cache.get(values, layout, geometry, x)
