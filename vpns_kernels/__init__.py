"""Pack a masked layer and run it: patterns, formats, ops and their kernels. Usable without the trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from vpns_kernels.convert import densify, freeze, mask_layers, mask_modules, sparsify, weight_masks
    from vpns_kernels.engine import ArtifactError, Engine, LoweringError, TraceError
    from vpns_kernels.engine.compile import compile
    from vpns_kernels.engine.load import load
    from vpns_kernels.fusing import fuse
    from vpns_kernels.memory import keep_freed_memory
    from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

__all__ = [
    "OPS",
    "ArtifactError",
    "ConvGeometry",
    "Engine",
    "LayerQuery",
    "LoweringError",
    "Packed",
    "Pattern",
    "PromptGeometry",
    "Refresh",
    "SparseConv2d",
    "SparseLinear",
    "TraceError",
    "batch_norm_act",
    "channel_mask",
    "compile",
    "densify",
    "explain",
    "freeze",
    "fuse",
    "keep_freed_memory",
    "kept_conv2d",
    "load",
    "mask_layers",
    "mask_modules",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "parse_pattern",
    "prompt_conv2d",
    "refresh_mask",
    "select_threshold",
    "sparse_conv2d",
    "sparse_conv2d_fused",
    "sparsify",
    "unpack",
    "weight_masks",
]
# Imported when first asked for: what the engine imports takes longer than all else together.
_LAZY = {
    "vpns_kernels.convert": (
        "densify",
        "freeze",
        "mask_layers",
        "mask_modules",
        "sparsify",
        "weight_masks",
    ),
    "vpns_kernels.engine": ("ArtifactError", "Engine", "LoweringError", "TraceError", "compile", "load"),
    "vpns_kernels.fusing": ("fuse",),
    "vpns_kernels.memory": ("keep_freed_memory",),
    "vpns_kernels.sparse_modules": ("SparseConv2d", "SparseLinear"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _LAZY.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
