"""How are torchvision's published weights fetched? Through torchvision itself, imported when asked for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor
from torch.library import Library


def fetch_state(model_name: str, weights_name: str) -> dict[str, Tensor]:
    """The state dict that torchvision publishes under this name for this architecture; downloaded once."""
    models = _import_torchvision_models()
    if model_name not in models.list_models(models):
        raise ValueError(f"fetch_state: expected an architecture of torchvision, got {model_name!r}")
    weights = models.get_model_weights(model_name).__members__
    if weights_name not in weights:
        raise ValueError(
            f"fetch_state: expected one of {list(weights)} for {model_name}, got {weights_name!r}"
        )
    try:
        state: dict[str, Tensor] = weights[weights_name].get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise ConnectionError(
            f"fetch_state: expected to download {weights_name} of {model_name}, got {error} "
            "(model.weights also takes a file)"
        ) from error
    return state


def _import_torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"fetch_state: expected torchvision to be installed, got {error} "
            "(pip install torchvision, in the version that belongs to the installed torch)"
        ) from error
    except RuntimeError as error:
        # So stops a torchvision built for CUDA on a CPU-only torch: it describes ops that it could not load.
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_absent_ops()
        return importlib.import_module("torchvision.models")


@functools.cache  # A Library takes its operators along when it is collected.
def _declare_absent_ops() -> Library:
    library = Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
