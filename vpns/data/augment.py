"""How does a batch of stored images become network input? Resized; in training cut and flipped at random."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def make_batch(
    images: Tensor,
    size: int,
    generator: torch.Generator | None = None,
    flip: bool = False,
    crop: bool = True,
) -> Tensor:
    """Float32 [N, 3, size, size] in [0, 1] on the images' device, from uint8 [N, 3, H, W].

    Args:
        generator: draws the crop and the flip of each image; None is the test transform, which only resizes.
        flip: mirror each image with probability one half.
        crop: resize to 9/8 of the size and cut the size out at random, as the paper does.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"make_batch: expected uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    if size < 1:
        raise ValueError(f"make_batch: expected size >= 1 pixel, got {size}")
    if generator is None:
        return _resize(images, size)
    side = crop_from(size) if crop else size
    if images.shape[2:] == (side, side):
        # As bytes, which are a quarter of what they become.
        return _to_float(_cut(images, size, generator, flip))
    return _cut(_resize(images, side), size, generator, flip)


def crop_from(size: int) -> int:
    """Side in pixels that images are resized to before a square of this size is cut out of them: 9/8."""
    return size * 9 // 8


def _resize(images: Tensor, size: int) -> Tensor:
    """As torchvision's Resize on tensors: bilinear, antialiased, without rounding to whole grey levels."""
    pixels = _to_float(images)
    if images.shape[2:] == (size, size):
        return pixels
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp_(0, 1)


def _to_float(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _cut(images: Tensor, size: int, generator: torch.Generator, flip: bool) -> Tensor:
    """A random square of each image, mirrored for about half of them if flip.

    Copied image by image, rows at once: by tensors of indices each pixel would be looked up.
    """
    count, room = len(images), images.shape[2] - size + 1
    tops, lefts = (torch.randint(room, (count, 1), generator=generator).flatten().tolist() for _ in range(2))
    is_flipped = [False] * count
    if flip:
        is_flipped = (torch.rand(count, 1, generator=generator) < 0.5).flatten().tolist()
    found = images.new_empty(count, 3, size, size)
    for to, image, top, left, mirror in zip(found, images, tops, lefts, is_flipped, strict=True):
        square = image[:, top : top + size, left : left + size]
        to.copy_(square.flip(2) if mirror else square)
    return found
