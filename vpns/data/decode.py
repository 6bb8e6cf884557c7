"""How does an image file become pixels? Decoded by Pillow, in RGB, resized to squares as torchvision does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def read_image(path: Path, sides: tuple[int, ...]) -> list[np.ndarray]:
    """One image in each size, each from the file's own pixels: uint8 [3, side, side].

    Of 16-bit grey levels the upper eight bits count.

    Raises:
        ValueError: naming the file, where it does not decode.
    """
    try:
        with Image.open(path) as image:
            pixels = _to_rgb(image)
            sized = [pixels.resize((side, side), Image.Resampling.BILINEAR) for side in sides]
            return [np.asarray(one).transpose(2, 0, 1) for one in sized]
    except Exception as error:
        # Pillow's decoders raise many types, few of which name the file.
        raise ValueError(f"read_image: expected an image that decodes, got {path} ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow by itself would clip them at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected grey levels or colours of 8 or 16 bits, got Pillow's mode {image.mode}")
    return image.convert("RGB")
