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
    return _cut(_resize(images, crop_from(size) if crop else size), size, generator, flip)


def crop_from(size: int) -> int:
    """Side in pixels that images are resized to before a square of this size is cut out of them: 9/8."""
    return size * 9 // 8


def _resize(images: Tensor, size: int) -> Tensor:
    """As torchvision's Resize on tensors: bilinear, antialiased, without rounding to whole grey levels."""
    pixels = images.float() / 255
    if images.shape[2:] == (size, size):
        return pixels
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp_(0, 1)


def _cut(images: Tensor, size: int, generator: torch.Generator, flip: bool) -> Tensor:
    """A random square of each image, mirrored for about half of them if flip; all images at once."""
    count, room = len(images), images.shape[2] - size + 1
    device = generator.device
    top = torch.randint(room, (count, 1), generator=generator, device=device)
    left = torch.randint(room, (count, 1), generator=generator, device=device)
    reach = torch.arange(size, device=device)
    rows, columns = top + reach, left + reach  # [N, size]
    if flip:
        is_flipped = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(is_flipped, columns.flip(1), columns)
    rows, columns = _send(rows, images.device), _send(columns, images.device)
    batch = torch.arange(count, device=images.device)
    # The indices put the channels last: [N, size, size, 3].
    cut = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def _send(drawn: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU's copy is queued, so that nobody waits for what it still computes."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
