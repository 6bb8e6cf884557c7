"""When is Triton imported? Where a backend first meets tensors it could take: not everybody has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


class TritonBackend:
    """The module `vpns_kernels.ops.<op>.triton`, imported at first use.

    It takes tensors of one CUDA device; of the CPU where Triton's interpreter is on (TRITON_INTERPRET=1),
    which tests use to run the kernels without a GPU.
    """

    def __init__(self, op: str) -> None:
        self._name = f"vpns_kernels.ops.{op}.triton"

    def why_not(self, *args: Any) -> str | None:
        """The reason why these arguments cannot be taken: their device, no Triton, or the module's own."""
        reason = _why_not_here(list(_tensors(args)))
        if reason is None:
            reason = self._module.why_not(*args)
        return reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @property
    def _module(self) -> ModuleType:
        return import_module(self._name)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_here(tensors: list[Tensor]) -> str | None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    wanted = "cpu" if is_interpreted() else "cuda"
    if len(devices) != 1 or not devices[0].startswith(wanted):
        return f"it takes {wanted.upper()} tensors of one device, got {', '.join(devices)}"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if is_interpreted() and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "Triton's interpreter computes bfloat16 wrongly (a GPU does not)"
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
