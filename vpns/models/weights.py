"""Where do trained weights come from? A tensor file, a run folder or torchvision by name, checked by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpns.models.head import find_head
from vpns.models.torchvision_weights import fetch_state

# In a run folder, the best weights of the whole run and those of its first stage.
_RUN_FILES = (Path("weights.safetensors"), Path("pretrain", "weights.safetensors"))
_SHOWN_KEYS = 8


def load_weights(model: nn.Module, source: str | Path, model_name: str = "") -> None:
    """Copy trained weights into the model, every one of them or none.

    Args:
        source: a .safetensors, .pth or .pt file, a run folder, or "torchvision:NAME" (such as IMAGENET1K_V1).
        model_name: torchvision's name of the architecture; needed for torchvision's weights alone.
    """
    kind, _, weights_name = str(source).partition(":")
    state = fetch_state(model_name, weights_name) if kind == "torchvision" else _read_state(Path(source))
    _check_state(model, state, str(source))
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        files = [path / name for name in _RUN_FILES if (path / name).is_file()]
        if not files:
            wanted = " or ".join(str(name) for name in _RUN_FILES)
            raise FileNotFoundError(f"load_weights: expected {wanted} in the run folder, got {path}")
        path = files[0]
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
