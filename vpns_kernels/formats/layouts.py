"""What was found of a layout once, and holds until it changes or is gone?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Found = TypeVar("_Found")
# Of a layout's first array: others may stand beside it, and it may be written.
_KEPT = 8


class LayoutCache(Generic[_Found]):
    """What is kept of layouts, as long as the first array of each lives."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def get(self, layout: Sequence[Tensor], key: Hashable, make: Callable[[], _Found]) -> _Found:
        """What `make` gave when this layout was first seen with this key, as it is now."""
        kept: OrderedDict[Hashable, tuple[_Found, object]] = self._known.setdefault(layout[0], OrderedDict())
        stamped = key, *map(stamp, layout)
        if stamped not in kept:
            # While storages are held, their addresses are nobody else's.
            kept[stamped] = make(), [array.untyped_storage() for array in layout]
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return kept[stamped][0]


def stamp(tensor: Tensor) -> tuple[object, ...]:
    """Another wherever the content is; writes in inference mode, into what was made in it, leave no trace."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype
