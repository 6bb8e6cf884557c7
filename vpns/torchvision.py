"""Who needs torchvision, and it is not installed? Told so, with the way to install it."""

from __future__ import annotations

from types import ModuleType

from vpns_kernels.torchvision_import import import_torchvision


def need_torchvision(who: str, part: str) -> ModuleType:
    """torchvision's package of this name; NotImplementedError naming who wants it where it is missing."""
    try:
        return import_torchvision(part)
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"{who}: expected torchvision to be installed, got {error} "
            "(pip install torchvision, in the version that belongs to the installed torch)"
        ) from error
