"""Pack a masked layer and run it: patterns, formats, ops and their kernels. Usable without the trainer."""

from typing import Any

from vpns_kernels.cost import LayerQuery
from vpns_kernels.explain import explain
from vpns_kernels.formats import Packed, pack, unpack
from vpns_kernels.geometry import ConvGeometry, PromptGeometry
from vpns_kernels.ops import (
    OPS,
    batch_norm_act,
    channel_mask,
    kept_conv2d,
    masked_conv2d,
    masked_linear,
    prompt_conv2d,
    select_threshold,
    sparse_conv2d,
    sparse_conv2d_fused,
)
from vpns_kernels.patterns import Pattern, parse_pattern
from vpns_kernels.refresh import Refresh, refresh_mask

__all__ = [
    "OPS",
    "ConvGeometry",
    "LayerQuery",
    "Packed",
    "Pattern",
    "PromptGeometry",
    "Refresh",
    "batch_norm_act",
    "channel_mask",
    "explain",
    "kept_conv2d",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "parse_pattern",
    "prompt_conv2d",
    "refresh_mask",
    "select_threshold",
    "sparse_conv2d",
    "sparse_conv2d_fused",
    "unpack",
]


def __getattr__(name: str) -> Any:
    # Not above: what the engine imports takes longer than all else together.
    if name in ("Engine", "compile", "load"):
        from vpns_kernels import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
