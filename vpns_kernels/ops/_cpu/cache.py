"""Which prepared forms of a packed weight are kept? Those used last, until the layout changes or is gone.

Training changes the values at each step, but not their layout: that is validated and planned once, and the
form of each pass is filled with the new values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vpns_kernels.formats import validate
from vpns_kernels.formats.layouts import stamp
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._cpu import prepared
from vpns_kernels.ops._cpu.gradients import InputGradient, WeightGradient
from vpns_kernels.ops._cpu.prepared import Prepared

# Input shapes (and dtypes and thread counts) for which a pass keeps a weight in its kernel's order.
_KEPT_SHAPES = 8

_Form = TypeVar("_Form")
# (values, layout, geometry, shape of x, dtype of x, kernel) → the form.
_Prepare = Callable[[Tensor, Sequence[Tensor], ConvGeometry, Sequence[int], torch.dtype, str], _Form]


class PreparedCache(Generic[_Form]):
    """The forms of one layout; any number of threads may ask. Never copied or saved with its owner.

    Args:
        prepare: makes a form; importable by name, so that an owner can be pickled. A form that can take
            other values of its layout at less cost has `refilled(values)`, which gives the new form.
        compares_values: at each call, with a copy. Otherwise a change of them that leaves no trace goes
            unnoticed (through `.data`, by torch's fused optimizers, in a compiled step), as one of the layout
            always does.
    """

    def __init__(self, prepare: _Prepare[_Form], compares_values: bool = False) -> None:
        self._prepare, self.compares_values = prepare, compares_values
        self._lock = Lock()
        self._made: _Made[_Form] | None = None
        # What was asked last, the form and the storages: read and written at once, so no lock is needed
        self._last: tuple[tuple[object, ...], _Form, list[object]] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedCache[_Form]:
        return PreparedCache(self._prepare, self.compares_values)

    def __reduce__(self) -> tuple[type[PreparedCache[Any]], tuple[_Prepare[_Form], bool]]:
        return PreparedCache, (self._prepare, self.compares_values)

    def get(
        self,
        values: Tensor,
        layout: Sequence[Tensor],
        geometry: ConvGeometry,
        x_shape: Sequence[int],
        x_dtype: torch.dtype,
        kernel: str = "",
        prepare: _Prepare[_Form] | None = None,
    ) -> _Form:
        """The form for inputs of this shape and dtype; a new layout is validated first.

        Args:
            prepare: makes the form in place of the cache's own.
        """
        make = prepare or self._prepare
        args = (values, layout, geometry, x_shape, x_dtype, kernel)
        if _is_untraced(values, layout):
            validate(values, layout, geometry)
            return make(*args)
        key = (tuple(x_shape), x_dtype, kernel, torch.get_num_threads(), values.dtype)
        stamps = values.shape, geometry, *map(stamp, layout)
        with self._lock:
            made = self._made
            if made is None or made.stamps != stamps:
                validate(values, layout, geometry)
                made = self._made = _Made(stamps, tuple(tensor.untyped_storage() for tensor in layout))
            filling = made.filling_of(values, self.compares_values)
            forms = made.forms.setdefault(make, OrderedDict())
            found, filled = forms.get(key, (None, -1))
            if found is not None and filled == filling:
                forms.move_to_end(key)
                return found
        # Outside the lock: other shapes need not wait. Two threads may prepare the same; one is kept.
        form = None if found is None else _refilled(found, values)
        if form is None:
            form = make(*args)
        with self._lock:
            known, filled = forms.get(key, (None, -1))
            if known is not None and filled >= filling:
                return known if filled == filling else form
            forms[key] = form, filling
            forms.move_to_end(key)
            while len(forms) > _KEPT_SHAPES:
                forms.popitem(last=False)
        return form

    def same_as_last(
        self, values: Tensor, layout: Sequence[Tensor], x: Tensor, kernel: str = ""
    ) -> _Form | None:
        """The form that `remember` was told, where nothing differs from then: small calls' short way."""
        last = self._last
        if last is None or self.compares_values or _is_untraced(values, layout):
            return None
        return last[1] if last[0] == _ticket(values, layout, x, kernel) else None

    def remember(
        self, form: _Form, values: Tensor, layout: Sequence[Tensor], x: Tensor, kernel: str = ""
    ) -> None:
        """Keep the form that `get` gave for this input within reach of `same_as_last`."""
        if not _is_untraced(values, layout):
            storages: list[object] = [tensor.untyped_storage() for tensor in (values, *layout)]
            self._last = _ticket(values, layout, x, kernel), form, storages

    def compare_values(self, is_wanted: bool) -> None:
        """From now on, at each call, or not; either way the next call takes them for others."""
        with self._lock:
            self.compares_values, self._last = is_wanted, None
            if self._made is not None:
                self._made.forget_values()


def _refilled(form: _Form, values: Tensor) -> _Form | None:
    refilled: _Form | None = form.refilled(values) if hasattr(form, "refilled") else None
    return refilled


class _Made(Generic[_Form]):
    """Forms by what made them, least recently used first, each with the number of the filling it holds.

    Holding on to the storages keeps their addresses from being given to others, so that equal stamps mean
    equal content.
    """

    def __init__(self, stamps: tuple[object, ...], storages: tuple[object, ...]) -> None:
        self.stamps, self.storages = stamps, storages
        self.forms: dict[Any, OrderedDict[tuple[object, ...], tuple[_Form, int]]] = {}
        self._filling, self._values_stamp = 0, tuple[object, ...]()
        self._values_storage: object = None
        self._copy: Tensor | None = None

    def forget_values(self) -> None:
        self._values_stamp = ()

    def filling_of(self, values: Tensor, compares_values: bool) -> int:
        """A number that rises whenever the values are others than at the last call."""
        now = stamp(values)
        is_same = now == self._values_stamp
        if is_same and compares_values:
            is_same = self._copy is not None and torch.equal(self._copy, values)
        if not is_same:
            self._filling += 1
            self._values_stamp, self._values_storage = now, values.untyped_storage()
            self._copy = values.detach().clone() if compares_values else None
            # What cannot be filled again is of no more use.
            for forms in self.forms.values():
                for key in [key for key, (form, _) in forms.items() if not hasattr(form, "refilled")]:
                    del forms[key]
        return self._filling


def _is_untraced(values: Tensor, layout: Sequence[Tensor]) -> bool:
    """Made under inference_mode: changes leave no trace, so nothing may be kept."""
    return any([tensor.is_inference() for tensor in (values, *layout)])


def _ticket(values: Tensor, layout: Sequence[Tensor], x: Tensor, kernel: str) -> tuple[object, ...]:
    return (x.shape, x.dtype, kernel, torch.get_num_threads(), stamp(values), *map(stamp, layout))


# For calls of the op, which owns nothing: in a compiled or exported graph nobody else could keep the forms.
# They go when the first tensor of the layout goes, so they must not hold it. Comparing costs little beside
# preparing anew.
_CACHES = WeakTensorKeyDictionary()
_CACHES_LOCK = Lock()


def prepared_for(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry, x: Tensor) -> Prepared:
    """The form of these values that takes x, kept as long as their layout lives."""
    make = prepared.Prepared
    form: Prepared = _cache_of(layout).get(values, layout, geometry, x.shape, x.dtype, "", make)
    return form


def input_gradient(
    grad: Tensor, x_shape: Sequence[int], values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """[N, K, P, Q] → [N, C, H, W] as grad, channels_last: the forward kernels, on the transposed weight."""
    cache: PreparedCache[InputGradient] = _cache_of(layout)
    return cache.get(values, layout, geometry, x_shape, grad.dtype, "", InputGradient).run(grad)


def weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> Tensor:
    """The gradient of the kept weights (or blocks) alone: float32, in packed order."""
    cache: PreparedCache[WeightGradient] = _cache_of(layout)
    return cache.get(values, layout, geometry, x.shape, x.dtype, "", WeightGradient).run(grad, x)


def _cache_of(layout: Sequence[Tensor]) -> PreparedCache[Any]:
    with _CACHES_LOCK:
        cache: PreparedCache[Any] | None = _CACHES.get(layout[0])
        if cache is None:
            cache = _CACHES[layout[0]] = PreparedCache(prepared.Prepared, compares_values=True)
    return cache
