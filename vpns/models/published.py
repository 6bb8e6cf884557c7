"""Which networks are known by a name that is not our own? Those of torchvision and timm, where installed."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from vpns.torchvision import need_torchvision
from vpns_kernels.torchvision_import import import_torchvision

LIBRARIES = ("torchvision", "timm")
_TIMM_HINT = 'pip install -c constraints.txt -e ".[timm]"'


def split_name(name: str) -> tuple[str, str]:
    """A library, or nothing, and the name in it: "timm:resnet18" where both libraries have one."""
    library, _, rest = name.partition(":")
    return (library, rest) if library in LIBRARIES else ("", name)


def build_published(name: str, num_classes: int) -> nn.Module:
    """torchvision's network of this name, or else timm's, with a start from torch's own generator.

    Args:
        name: alone, or after "torchvision:" or "timm:".

    Raises:
        ValueError: a name that none of those installed has.
    """
    library, known = split_name(name)
    names: dict[str, list[str]] = {}
    for wanted in (library,) if library else LIBRARIES:
        if library or find_spec(wanted) is not None:
            listed = names[wanted] = _LISTS[wanted]()
            if known in listed:
                return _build(wanted, known, num_classes)
    looked_in = " and ".join(names) or "nowhere: neither torchvision nor timm is installed"
    near = get_close_matches(known, sorted({one for listed in names.values() for one in listed}), 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        "build_model: expected model.name to be a network's, or 'module:factory', "
        f"got {name!r} (looked in vpns.models, {looked_in}{hint})"
    )


def fetch_torchvision_state(model_name: str, weights_name: str) -> dict[str, Tensor]:
    """The state dict that torchvision publishes under this name for this architecture; downloaded once."""
    models = need_torchvision("fetch_state", "models")
    _, known = split_name(model_name)
    if known not in models.list_models(models):
        raise ValueError(f"fetch_state: expected an architecture of torchvision, got {model_name!r}")
    weights = models.get_model_weights(known).__members__
    if weights_name not in weights:
        raise ValueError(
            f"fetch_state: expected one of {list(weights)} for {model_name}, got {weights_name!r}"
        )
    try:
        state: dict[str, Tensor] = weights[weights_name].get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise _failed(weights_name, model_name, error) from error
    return state


def fetch_timm_state(model_name: str, weights_name: str) -> dict[str, Tensor]:
    """The state dict of timm's weights of this tag, or of "default"; downloaded once."""
    timm = _need_timm()
    _, known = split_name(model_name)
    if not timm.is_model(known):
        raise ValueError(f"fetch_state: expected an architecture of timm, got {model_name!r}")
    tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{known}.*")]
    if weights_name not in ("default", *tags):
        raise ValueError(
            f"fetch_state: expected default or one of {tags} for {model_name}, got {weights_name!r}"
        )
    full = known if weights_name == "default" else f"{known}.{weights_name}"
    try:
        network = timm.create_model(full, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise _failed(weights_name, model_name, error) from error
    state: Mapping[str, Tensor] = network.state_dict()
    return dict(state)


def _build(library: str, name: str, num_classes: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes}
    network: nn.Module
    if library == "timm":
        network = _with_plain_linears(_need_timm().create_model(name, pretrained=False, **options))
    else:
        network = need_torchvision("build_model", "models").get_model(name, weights=None, **options)
    return network


def _with_plain_linears(network: nn.Module) -> nn.Module:
    """timm's own Linear differs from torch's in scripts alone, and masks go on torch's."""
    linear = import_module("timm.layers").Linear
    for name, layer in list(network.named_modules()):
        if type(layer) is linear:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            network.set_submodule(name, plain)
    return network


def _list_torchvision() -> list[str]:
    models = need_torchvision("build_model", "models")
    return list(models.list_models(models))


def _list_timm() -> list[str]:
    return list(_need_timm().list_models())


_LISTS = {"torchvision": _list_torchvision, "timm": _list_timm}


def _need_timm() -> ModuleType:
    try:
        # timm imports torchvision, which may have to be told how.
        import_torchvision("models")
        import timm
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"build_model: expected timm to be installed, got {error} ({_TIMM_HINT})"
        ) from error
    module: ModuleType = timm
    return module


def _failed(weights_name: str, model_name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"fetch_state: expected to download {weights_name} of {model_name}, got {error} "
        "(model.weights also takes a file)"
    )
