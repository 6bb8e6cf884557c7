"""Prune a vision network with a visual prompt and a weight mask that are learned together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vpns.config import (
    DataConfig,
    LabelMapConfig,
    ModelConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    StageConfig,
    TuneConfig,
)

if TYPE_CHECKING:
    from vpns.dry_run import describe_run
    from vpns.exchange import export_as
    from vpns.observe import Observer, Progress
    from vpns.run import execute, load_config
    from vpns.state import StageRecord

__all__ = [
    "DataConfig",
    "LabelMapConfig",
    "ModelConfig",
    "Observer",
    "PretrainConfig",
    "Progress",
    "PromptConfig",
    "RunConfig",
    "SearchConfig",
    "StageConfig",
    "StageRecord",
    "TuneConfig",
    "describe_run",
    "execute",
    "export_as",
    "load_config",
]
# Imported when first asked for: they import torch, which the command line does without as long as it can.
_LAZY = {
    "vpns.dry_run": ("describe_run",),
    "vpns.exchange": ("export_as",),
    "vpns.observe": ("Observer", "Progress"),
    "vpns.run": ("execute", "load_config"),
    "vpns.state": ("StageRecord",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _LAZY.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
