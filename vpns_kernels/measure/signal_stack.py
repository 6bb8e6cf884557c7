"""Where do this thread's signal handlers run? On the stack of before, whatever a library did meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give the calling thread its alternate signal stack back.

    OpenVINO sets one of its own and frees it with the network: the next Ctrl-C would end the process by a
    segmentation fault.

    Raises:
        OSError: the system refuses.
    """
    before = _Stack()
    _call(None, before)
    try:
        yield
    finally:
        _call(before, None)


def _call(new: _Stack | None, old: _Stack | None) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    places = (None if stack is None else ctypes.byref(stack) for stack in (new, old))
    if library.sigaltstack(*places) != 0:
        raise OSError(ctypes.get_errno(), "sigaltstack")
