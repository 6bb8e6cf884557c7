"""Where is the compiled library? Here, loaded once, if it was built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# torch brings the OpenMP runtime that the library shares with it.
import torch  # noqa: F401


def _load() -> tuple[Any, str | None]:
    try:
        return import_module("vpns_kernels._native"), None
    except ImportError as error:
        return (
            None,
            f"the compiled library is missing ({error}; build it with `python setup.py build_ext --inplace`)",
        )


# At import, not at first use: a graph that torch.compile traces may ask, but not load.
_LIBRARY, _REASON = _load()


def why_not() -> str | None:
    """None where the compiled library is there, else the reason why not."""
    return _REASON


def library() -> Any:
    """The compiled library; ImportError with the reason where it is not there."""
    if _LIBRARY is None:
        raise ImportError(f"vpns_kernels.native: expected the compiled library, got nothing: {_REASON}")
    return _LIBRARY
