"""Where is the compiled library? Here, loaded once, if it was built."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

# torch brings the OpenMP runtime that the library shares with it.
import torch


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
_ISA_AT_IMPORT: tuple[str, ...] = () if _LIBRARY is None else tuple(_LIBRARY.isa_list())


def why_not() -> str | None:
    """None where the compiled library is there, else the reason why not."""
    return _REASON


def library() -> Any:
    """The compiled library; ImportError with the reason where it is not there."""
    if _LIBRARY is None:
        raise ImportError(f"vpns_kernels.native: expected the compiled library, got nothing: {_REASON}")
    return _LIBRARY


def has_isa(name: str) -> bool:
    """Whether the named instruction set may be used now; a graph that is traced takes what held at import."""
    if torch.compiler.is_compiling():
        return name in _ISA_AT_IMPORT
    return _LIBRARY is not None and name in _LIBRARY.isa_list()


def why_no_cuda() -> str | None:
    """None where the library's GPU part is there, else the reason why not."""
    return _load_cuda()[1]


def cuda_library() -> Any:
    """The library's GPU part; ImportError with the reason where it is not there."""
    library, reason = _load_cuda()
    if library is None:
        raise ImportError(f"vpns_kernels.native: expected the library's GPU part, got nothing: {reason}")
    return library


@cache
def _load_cuda() -> tuple[Any, str | None]:
    # Loaded when first asked for: most processes have no GPU.
    try:
        return import_module("vpns_kernels._cuda"), None
    except ImportError as error:
        return None, f"the library's GPU part is missing ({error}; it is built where nvcc is found)"
