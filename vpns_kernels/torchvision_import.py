"""How is torchvision imported beside a torch for CPUs, where the registry's build of it stops?"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch.library import Library


def import_torchvision(part: str) -> ModuleType:
    """A package of torchvision, such as "models" or "datasets".

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        # So stops a torchvision built for CUDA on a CPU-only torch: it describes ops that it could not load.
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_absent_ops()
    return importlib.import_module(f"torchvision.{part}")


@functools.cache  # A Library takes its operators along when it is collected.
def _declare_absent_ops() -> Library:
    library = Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
