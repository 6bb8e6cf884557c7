"""How are torchvision's published weights fetched? Through torchvision itself, imported when asked for."""

from __future__ import annotations

from torch import Tensor

from vpns.torchvision import need_torchvision


def fetch_state(model_name: str, weights_name: str) -> dict[str, Tensor]:
    """The state dict that torchvision publishes under this name for this architecture; downloaded once."""
    models = need_torchvision("fetch_state", "models")
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
