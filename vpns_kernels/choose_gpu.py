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
# as few weights are left of channels, those of channels or the smaller layer.
LEAST_SIDE, MOST_DENSITY = 16, 0.5
# The kernels of channels gather what they read once for each tap and as many outputs as a program owns; the
# smaller layer once, but it writes and reads what it gathered, and scatters. By loads and bytes the two break
# even at about nine times, a 3x3 filter's: an estimate, until compile() or a bench measures.
MOST_GATHERS, OUTPUTS = 9, 128
UNMEASURED = "no costs were measured on this GPU"


def gpu_kernel(query: LayerQuery, refusals: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The kernel ("dense" for torch) and why.

    Args:
        refusals: of kernels, in order of preference, why they do not take the layer, or empty.
    """
    able = [name for name, refusal in refusals if not refusal]
    if not able:
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
    kernel = able[0]
    if query.format == "channel":
        gathers = _count_gathers(query)
        form = f"channels gathered {gathers} times" if gathers else "channels, all inputs kept,"
        if gathers > MOST_GATHERS and "compact" in able:
            kernel = "compact"
    return kernel, f"{kernel}: {UNMEASURED}; {form} at density {query.density:.2g}"


def gpu_refusals(query: LayerQuery) -> Sequence[tuple[str, str]]:
    """The kernels of a GPU, each with the reason why it does not take a layer."""
    is_channel = query.format == "channel"
    compact = "" if is_channel else "it takes channel-pruned weights"
    return [("triton", _why_not_triton(query)), ("compact", compact)]


def _count_gathers(query: LayerQuery) -> int:
    """How often the kernels of channels gather an input; none where all are kept."""
    kept_out, kept_in, R, S = query.values_sizes
    return 0 if kept_in == query.geometry.in_channels else R * S * -(-kept_out // OUTPUTS)


def _why_not_triton(query: LayerQuery) -> str:
    if query.format == "unstructured":
        return "it takes blocks and channels"
    if find_spec("triton") is None:
        return "triton is not installed"
    # Not above: they import triton.
    dtype = torch.promote_types(getattr(torch, query.dtype), getattr(torch, query.weight_dtype))
    reason: str | None
    if query.format == "channel":
        channels = import_module("vpns_kernels.ops._triton.channel_lists")
        reason = channels.why_not(query.geometry, dtype)
    else:
        blocks = import_module("vpns_kernels.ops._triton.blocks")
        bk, bc = query.values_sizes[1:]
        reason = blocks.why_not((bk, bc), query.geometry, dtype)
    return reason or ""
