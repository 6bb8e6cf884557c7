"""How large are the pieces that programs work on? Pure functions of sizes, dtype and the device's limits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

# Bytes of shared memory that a program may take, by compute capability; A100's where nothing else is known.
_SHARED_BYTES = {8: 160 * 1024, 9: 220 * 1024}
# Lists of kept blocks are short: programs that share a multiprocessor hide more than loads of one.
_LIST_STAGES = 3
# Sums over pixels are long.
_PIXEL_STAGES = 5
# Four for each multiprocessor of an H200.
_PROGRAMS = 4 * 132
# Fewer would cost more to sum up than to compute.
_LEAST_BOXES = 8


@dataclass(frozen=True)
class PixelTile:
    """A box of output pixels: images, rows, columns, each a power of two."""

    images: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """How many output pixels the box holds."""
        return self.images * self.rows * self.columns

    def count(self, N: int, P: int, Q: int) -> int:
        """Boxes that cover N images of P × Q pixels."""
        return -(-N // self.images) * -(-P // self.rows) * -(-Q // self.columns)


@dataclass(frozen=True)
class Tiles:
    """What one program computes, and with how much."""

    pixels: PixelTile
    warps: int
    stages: int


def pick_tiles(
    sizes: tuple[int, int, int],
    block: tuple[int, int],
    dtype: torch.dtype,
    capability: int,
    precision: str = "tf32",
    classes: int = 1,
) -> Tiles:
    """Tiles of the forward pass and of the input's gradient.

    A thread has both operands of a product in registers beside its sums, but where tensor cores read shared
    memory, as Hopper's do. Without those more warps share the sums.

    Args:
        sizes: N, P, Q of what is written (of a class of it).
        block: channels of an output and of an input block.
        capability: that of the products (launch.product_capability).
        precision: of products of float32, "tf32" or "ieee", which no tensor core takes.
        classes: of pixels that are read, each by a list of its own.
    """
    is_half, is_hopper = dtype.itemsize == 2, capability >= 9
    is_full = not is_half and precision == "ieee"
    # Float32 takes twice the memory.
    most = 128 if is_half else 32 if is_full and not is_hopper else 64
    # Read by addresses, four classes spilled with more, and so did wide blocks of full products.
    has_fewer = (classes > 1 and (is_half or is_full)) or (is_full and max(block) >= 64)
    if has_fewer and not is_hopper:
        most //= 2
    # Products of a warp group have 64 rows; fewer would leave lanes idle.
    pixels = pick_pixels(sizes, most, least=min(most, 64))
    stage_bytes = (pixels.size + block[0]) * block[1] * dtype.itemsize
    has_many_sums = pixels.size * block[0] * dtype.itemsize > 2 * 64 * 128
    is_crowded = has_many_sums if is_hopper else max(block) >= 64 or not is_half
    warps = 8 if is_crowded else 4
    # Nor had the smallest tiles registers for the addresses of three stages.
    most_stages = 2 if most == 16 else _LIST_STAGES
    return Tiles(pixels, warps, pick_stages(stage_bytes, most_stages, capability))


def pick_pixels(sizes: tuple[int, int, int], most: int, least: int) -> PixelTile:
    """The box of `least` to `most` pixels that covers the output with the fewest pixels beyond its edges.

    Among equals the largest, then the one with the longest rows: what neighbours read lies near.
    """
    powers = [1 << i for i in range(most.bit_length())]
    boxes = [PixelTile(n, p, q) for n, p, q in product(powers, repeat=3) if least <= n * p * q <= most]
    return min(boxes, key=lambda box: (box.count(*sizes) * box.size, -box.size, -box.columns, -box.rows))


def pick_stages(stage_bytes: int, most: int, capability: int) -> int:
    """Loads under way: up to `most` where they fit in shared memory, at least two."""
    room = _SHARED_BYTES.get(capability, _SHARED_BYTES[8])
    return max(2, min(most, room // stage_bytes))


def pick_gradient_tiles(
    sizes: tuple[int, int, int], tile: tuple[int, int], dtype: torch.dtype, capability: int
) -> Tiles:
    """Tiles of the weights' and scores' gradients: how many pixels a program sums at a time.

    Args:
        sizes: N, P, Q of the output's gradient.
        tile: filters and channels of a program.
        capability: that of the products.
    """
    # Before Hopper operands lie in registers beside the sums (see pick_tiles).
    is_crowded, is_large = capability < 9 and min(tile) >= 64, tile[0] * tile[1] > 64 * 128
    most = (64 if dtype.itemsize == 2 else 32) // (2 if capability < 9 and is_large else 1)
    pixels = pick_pixels(sizes, most, least=16)
    stage_bytes = pixels.size * (tile[0] + tile[1]) * dtype.itemsize
    warps = 8 if is_crowded or is_large else 4
    return Tiles(pixels, warps, pick_stages(stage_bytes, _PIXEL_STAGES, capability))


def pick_split(programs: int, boxes: int) -> int:
    """Shares of the pixels: enough programs for a few waves, each with some boxes to sum."""
    wanted = -(-_PROGRAMS // max(1, programs))
    return max(1, min(wanted, boxes // _LEAST_BOXES))
