"""How does a user's own network come in? As "module:factory", called with the class count."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn


def call_factory(name: str, num_classes: int) -> nn.Module:
    """The network that factory(num_classes=...) returns; the module may lie in the current folder."""
    module_name, _, factory_name = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise ValueError(f"call_factory: expected 'module:factory', got {name!r}")
    with _import_from_current_folder():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"call_factory: expected a module that imports, got {name!r} ({error})"
            ) from error
        except (Exception, SystemExit) as error:
            raise _blame(name, "to import", error) from error
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            found = "no such attribute" if factory is None else type(factory).__name__
            raise ValueError(
                f"call_factory: expected a callable {factory_name!r} in {module_name!r}, got {found} "
                f"({module.__file__})"
            )
        try:
            model = factory(num_classes=num_classes)
        except (Exception, SystemExit) as error:
            raise _blame(name, f"to return a network for num_classes={num_classes}", error) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"call_factory: expected {name!r} to return a torch.nn.Module, got {type(model).__name__}"
        )
    if not any(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()):
        raise ValueError(
            f"call_factory: expected a model with Conv2d or Linear layers, got {name!r} (nothing to prune)"
        )
    return model


def _blame(name: str, duty: str, error: BaseException) -> ValueError:
    """The user's own code may raise anything, few of which name it."""
    return ValueError(f"call_factory: expected {name!r} {duty}, got {type(error).__name__}: {error}")


@contextmanager
def _import_from_current_folder() -> Iterator[None]:
    """As `python -m` does, also for an installed command; undone afterwards."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
