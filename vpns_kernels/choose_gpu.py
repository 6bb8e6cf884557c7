"""Which kernel runs a layer on a GPU? A rule of its sizes alone, while nobody has measured costs there.

Pure as choose(): the same layer gets the same kernel, whatever the GPU does meanwhile; compile() measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import torch

from vpns_kernels.cost import LayerQuery

# Blocks with sides of at least this, of which at most this share is kept, run by the kernels of blocks; where
# as few weights are left of channels, the smaller layer runs.
LEAST_SIDE, MOST_DENSITY = 16, 0.5
UNMEASURED = "no costs were measured on this GPU"


def gpu_kernel(query: LayerQuery, refusals: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The kernel ("dense" for torch) and why.

    Args:
        refusals: of kernels, in order of preference, why they do not take the layer, or empty.
    """
    kernel = next((name for name, refusal in refusals if not refusal), None)
    if kernel is None:
        why = "; ".join(f"{name}: {refusal}" for name, refusal in refusals)
        return "dense", f"dense: {UNMEASURED}; {why}"
    form = query.format
    if form == "block":
        block = query.values_sizes[1:]
        form = f"blocks of {block[0]}x{block[1]}"
        if min(block) < LEAST_SIDE:
            return "dense", f"dense: {UNMEASURED}; {form} have sides below {LEAST_SIDE}"
    if query.density > MOST_DENSITY:
        return "dense", f"dense: {UNMEASURED}; more than {MOST_DENSITY:g} is kept ({query.density:.2g})"
    return kernel, f"{kernel}: {UNMEASURED}; {form} at density {query.density:.2g}"


def gpu_refusals(query: LayerQuery) -> Sequence[tuple[str, str]]:
    """The kernels of a GPU, each with the reason why it does not take a layer."""
    is_channel = query.format == "channel"
    compact = "" if is_channel else "it takes channel-pruned weights"
    return [("triton", _why_not_triton(query)), ("compact", compact)]


def _why_not_triton(query: LayerQuery) -> str:
    if query.format != "block":
        return "it takes block weights"
    if find_spec("triton") is None:
        return "triton is not installed"
    # Not above: it imports triton.
    blocks = import_module("vpns_kernels.ops._triton.blocks")
    dtype = torch.promote_types(getattr(torch, query.dtype), getattr(torch, query.weight_dtype))
    bk, bc = query.values_sizes[1:]
    reason: str | None = blocks.why_not((bk, bc), query.geometry, dtype)
    return reason or ""
