"""Where do trained weights come from? A file, a run folder, torchvision or timm by name; checked by key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpns.models.head import find_head
from vpns.models.published import fetch_timm_state, fetch_torchvision_state

# Where a run's stages leave a whole network, and which stages lie between.
_PRETRAINED, _TUNED = (Path(stage, "weights.safetensors") for stage in ("pretrain", "tune"))
_BETWEEN = ("dense", "search")
_SHOWN_KEYS = 8
WEIGHT_LIBRARIES = {"torchvision": fetch_torchvision_state, "timm": fetch_timm_state}


def load_weights(model: nn.Module, source: str | Path, model_name: str = "") -> None:
    """Copy trained weights into the model, every one of them or none.

    Args:
        source: a .safetensors, .pth or .pt file, "torchvision:NAME" (such as IMAGENET1K_V1), "timm:TAG" (such
            as a1_in1k, or default), or a run folder, which gives what the run ended with: tuned weights, or
            pretrained ones where it went no further.
        model_name: the architecture's name in torchvision or timm; needed for their weights alone.
    """
    kind, _, weights_name = str(source).partition(":")
    fetch = WEIGHT_LIBRARIES.get(kind)
    state = _read_state(Path(source)) if fetch is None else fetch(model_name, weights_name)
    _check_state(model, state, str(source))
    own = model.state_dict()
    load_exactly(model, {name: state.get(name, tensor) for name, tensor in own.items()})


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy a state dict of this very model, as a file of plain tensors holds it.

    Args:
        strict: whether it must be whole.
    """
    versioned = OrderedDict(state)
    # Which version of each module wrote it: some refuse a state that does not say.
    versioned._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=strict)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = _find_last(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: expected a weight file or a run folder, got {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"load_weights: expected a .safetensors, .pth or .pt file, got {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file raises many types, none of which names the file.
        raise ValueError(f"load_weights: expected a readable weight file, got {path} ({error})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"load_weights: expected a state dict (names to tensors), got another object in {path} "
            "(save model.state_dict() alone)"
        )
    return dict(state)


def _find_last(folder: Path) -> Path:
    """The file of the run's last stage that leaves a whole network."""
    if (folder / _TUNED).is_file():
        return folder / _TUNED
    pretrained = folder / _PRETRAINED
    if not pretrained.is_file():
        wanted = f"{_TUNED} or {_PRETRAINED}"
        raise FileNotFoundError(f"load_weights: expected {wanted} in the run folder, got {folder}")
    if any((folder / stage).exists() for stage in _BETWEEN):
        # Neither what it began with nor what it will end with can be what was meant for certain.
        raise FileNotFoundError(
            f"load_weights: expected {_TUNED} in the run folder, got {folder}, which has not tuned "
            f"(vpns tune {folder}; or name {pretrained})"
        )
    return pretrained


def _check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    # Files older than this counter lack it; torch then starts it at zero.
    absent = sorted(key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    surplus = sorted(state.keys() - own.keys())
    if absent or surplus:
        raise ValueError(
            f"load_weights: expected the model's {len(own)} keys, got {source} "
            f"without {_abbreviate(absent)} and with unknown {_abbreviate(surplus)}"
        )
    _check_head(model, state, source)
    wrong = [
        f"{key} {list(own[key].shape)} (file: {list(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if wrong:
        raise ValueError(
            f"load_weights: expected the model's shapes, got others in {source}: {_abbreviate(wrong)}"
        )


def _check_head(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """A class count that differs is the commonest mistake, and deserves its own words."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return
    name, head = find_head(model)
    weight = state[f"{name}.weight" if name else "weight"]
    if weight.ndim == 2 and weight.shape[1] == head.in_features and len(weight) != head.out_features:
        raise ValueError(
            f"load_weights: expected a head of {head.out_features} classes, "
            f"got one of {len(weight)} in {source} (model.source_classes={len(weight)} fits the file)"
        )


def _abbreviate(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_KEYS]) or "none"
    return shown if len(names) <= _SHOWN_KEYS else f"{shown} and {len(names) - _SHOWN_KEYS} more"
