"""How large are the pieces of a channel-pruned convolution? Pure functions of sizes, as those of tiles.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vpns_kernels.geometry import Pair
from vpns_kernels.ops._triton.tiles import Tiles, pick_pixels, pick_stages

# Sums are short, and most programs that share a multiprocessor wait for channels that they gather.
_STAGES = 3


@dataclass(frozen=True)
class ChannelTiles:
    """What one program computes, and with how much.

    Args:
        block: channels that it writes, and that it reads at a time.
    """

    tiles: Tiles
    block: Pair


def pick_side(count: int, sides: tuple[int, ...]) -> int:
    """The side of the fewest blocks that cover `count` channels, the shortest of those."""
    return min(sides, key=lambda side: (-(-max(1, count) // side), side))


def pick_step(count: int, steps: tuple[int, ...]) -> int:
    """The step that goes through `count` channels with the fewest beyond; among equals the longest."""
    return min(steps, key=lambda step: (-(-max(1, count) // step) * step, -step))


def pick_channel_tiles(
    sizes: tuple[int, int, int],
    kept: Pair,
    is_run: bool,
    dtype: torch.dtype,
    capability: int,
    precision: str = "tf32",
) -> ChannelTiles:
    """Tiles of the forward pass and of the input's gradient.

    Args:
        sizes: N, P, Q of what is written (of a class of it).
        kept: channels that are written and read.
        is_run: whether descriptors read them.
        capability: major number of the device's compute capability.
        precision: of products of float32, "tf32" or "ieee", which no tensor core takes.
    """
    is_half, is_hopper = dtype.itemsize == 2, capability >= 9
    is_full = not is_half and precision == "ieee"
    # What is gathered is gathered again for each block of outputs.
    has_wide = is_half and is_hopper and not is_run
    # Float32 takes twice the memory, and products of its own multiply by registers alone.
    steps = (16,) if not is_half else (32, 64) if is_hopper or is_run else (32,)
    # Threads multiply in full by themselves, and spilled with the addresses of more.
    sides = (32, 64, 128) if has_wide else (32,) if is_full and not is_run else (32, 64)
    block = (pick_side(kept[0], sides), pick_step(kept[1], steps))
    # Addresses of what is gathered lie in registers: of fewer pixels, programs that share a multiprocessor
    # hide one another's loads.
    has_fewer = (is_full and is_run) or not (is_half or is_hopper)
    most = 32 if has_fewer else 128 if is_half and is_run and is_hopper else 64
    pixels = pick_pixels(sizes, most, least=min(most, 64))
    stage_bytes = (pixels.size + block[0]) * block[1] * dtype.itemsize
    # Before Hopper, and of full products, operands lie in registers as well: seen to spill with four warps.
    is_crowded = block[0] > (64 if is_half else 32) or (not is_hopper and is_half)
    is_crowded |= is_run and (is_full or not is_hopper)
    warps = 8 if is_crowded else 4
    return ChannelTiles(Tiles(pixels, warps, pick_stages(stage_bytes, _STAGES, capability)), block)


def pick_channel_gradient_tiles(
    sizes: tuple[int, int, int],
    kept: Pair,
    is_run: bool,
    dtype: torch.dtype,
    capability: int,
    precision: str = "tf32",
) -> ChannelTiles:
    """Tiles of the weights' gradient: how many pixels a program sums at a time, of which channels.

    Args:
        sizes: N, P, Q of the output's gradient.
        kept: filters and channels.
        is_run: whether descriptors read both.
        precision: as in `pick_channel_tiles`.
    """
    is_half = dtype.itemsize == 2
    block = (pick_side(kept[0], (32, 64)), pick_side(kept[1], (32, 64))) if is_half else (32, 32)
    pixels = pick_pixels(sizes, 64 if is_half and is_run else 32, least=16)
    stage_bytes = pixels.size * sum(block) * dtype.itemsize
    warps = 8 if not is_half and precision == "ieee" else 4
    return ChannelTiles(Tiles(pixels, warps, pick_stages(stage_bytes, _STAGES, capability)), block)
