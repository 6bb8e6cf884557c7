"""Prune a vision network with a visual prompt and a weight mask that are learned together."""

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

__all__ = [
    "DataConfig",
    "LabelMapConfig",
    "ModelConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunConfig",
    "SearchConfig",
    "StageConfig",
    "TuneConfig",
]
