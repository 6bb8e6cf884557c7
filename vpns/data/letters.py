"""The pretraining set: 52 letters in matplotlib's bundled fonts, soft and light on dark like the digits."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vpns.config import DataConfig
from vpns.data.base import ImageSet, Split, register
from vpns.data.splits import carve_splits

LETTERS = string.ascii_uppercase + string.ascii_lowercase
SIDE = 32
# Those with Latin glyphs; the other fonts that matplotlib ships hold symbols.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{style}10" for style in ("b", "mi", "r", "ss", "ti", "tt")),
)
_SHEET = 128  # Letters are drawn on a sheet of this side, then shrunk.
# Font size and what is added around each stroke, in pixels of the sheet, and the side to which the sheet
# is coarsened before it is blurred up: digits have 8 pixels, and strokes of one or two.
_STYLES = ((92, 5, 8), (112, 3, 9), (132, 1, 10))
_MAX_ANGLE_DEGREES = 12.0
_MAX_OFFSET = 8.0  # In pixels of the sheet.


@register("letters")
def load_letters(config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """Every letter in every font and style; val_fraction of them for validation and as many for test.

    No other setting concerns them: they stay as they are drawn, whatever the target task is.
    """
    letters = draw_letters()
    share = round(config.val_fraction * len(letters))
    parts = carve_splits(letters.labels, (share, share), seed, LETTERS, "the letters")
    test, val, train = (letters.select(part) for part in parts)
    return ImageSet(train, val, test, tuple(LETTERS))


def draw_letters() -> Split:
    """3,432 images of 32 x 32 pixels, the same at every call."""
    # Imported where letters are drawn: it takes longer than all that most runs need of it.
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # Drawn once for all, so that the letters do not depend on any seed of the run.
    generator = torch.Generator().manual_seed(0)
    images = []
    for name in FONTS:
        for font_size, stroke, grain in _STYLES:
            font = ImageFont.truetype(folder / f"{name}.ttf", font_size)
            places = torch.rand(len(LETTERS), 3, generator=generator) * 2 - 1
            images += [
                _draw(letter, font, stroke, grain, place)
                for letter, place in zip(LETTERS, places, strict=True)
            ]
    grey = torch.from_numpy(np.stack(images))[:, None]  # [N, 1, 32, 32]
    labels = torch.arange(len(LETTERS)).repeat(len(images) // len(LETTERS))
    return Split(grey.expand(-1, 3, -1, -1).contiguous(), labels)


def _draw(letter: str, font: ImageFont.FreeTypeFont, stroke: int, grain: int, place: Tensor) -> np.ndarray:
    """One letter, uint8 [32, 32]; place holds its angle and its offset, each in [-1, 1]."""
    angle, right, down = place.tolist()
    sheet = Image.new("L", (_SHEET, _SHEET))
    middle = (_SHEET / 2 + right * _MAX_OFFSET, _SHEET / 2 + down * _MAX_OFFSET)
    ImageDraw.Draw(sheet).text(middle, letter, fill=255, font=font, anchor="mm", stroke_width=stroke)
    sheet = sheet.rotate(angle * _MAX_ANGLE_DEGREES, Image.Resampling.BILINEAR)
    coarse = np.asarray(sheet.resize((grain, grain), Image.Resampling.BOX))
    # Thin strokes lose their light when coarsened; like digits, every letter reaches full white.
    bright = Image.fromarray((coarse * (255 / coarse.max())).astype(np.uint8))
    return np.asarray(bright.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
