"""How does a data set on disk become a run's images? Listed, checked, decoded once, split by seed."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from torch import Tensor

from vpns.config import DataConfig
from vpns.data.augment import crop_from
from vpns.data.base import DATASETS, ImageSet, Split
from vpns.data.cache import cache_folder, open_decoded
from vpns.data.listing import LAYOUTS, Layout, Listing, Samples, list_data
from vpns.data.splits import carve_splits


def register_layout(layout: Layout) -> Layout:
    """Make a data set on disk known under its name."""
    LAYOUTS[layout.name] = layout
    DATASETS[layout.name] = partial(load_mapped, layout)
    return layout


def find_home(layout: Layout, given: str | None) -> Path:
    """The set's own folder at data.root; FileNotFoundError where it is not there."""
    if given is None:
        raise ValueError(f"load_{layout.name}: expected data.root, the path of an image folder, got None")
    root = Path(given).absolute()
    home = layout.find(root)
    if home is None:
        named = [home for home in layout.homes if home != "."]
        wanted = f"{' or '.join(named)} in data.root" if named else "an image folder"
        ways = [
            *(["--download fetches it"] if layout.download else []),
            *([layout.hint] if layout.hint else []),
        ]
        hint = f" ({'; '.join(ways or ['data.root'])})"
        raise FileNotFoundError(f"load_{layout.name}: expected {wanted}, got {given}{hint}")
    return home


def load_mapped(layout: Layout, config: DataConfig, seed: int, canvas: int) -> ImageSet:
    """The set at data.root, resized to squares of data.load_size, or of its own size, or of the canvas.

    Without a data.load_size, training images are kept in 9/8 of the canvas too: crops are then cut, as
    published, of an image that was resized once. A split that the set lacks is carved by seed from the
    training images: val_fraction of them.
    """
    home = find_home(layout, config.root)
    listing = list_data(layout, home)
    if listing.problems:
        more = f", and {len(listing.problems) - 1} more problems" if len(listing.problems) > 1 else ""
        raise ValueError(
            f"load_{layout.name}: expected a whole data set in {home}, got: {listing.problems[0]}{more} "
            f"(vpns data check {config.root})"
        )
    if layout.side and config.load_size not in (0, layout.side):
        raise ValueError(
            f"load_{layout.name}: expected data.load_size 0 or {layout.side}, got {config.load_size}"
        )
    sizes = _sizes(layout, config, canvas)
    splits = {
        name: _open(layout, home, name, samples, sizes if name == "train" else sizes[:1], config)
        for name, samples in listing.splits.items()
    }
    return _carve(listing, splits, config.val_fraction, seed, home)


def _sizes(layout: Layout, config: DataConfig, canvas: int) -> tuple[int, ...]:
    if layout.side or config.load_size or not config.crop:
        return (layout.side or config.load_size or canvas,)
    return canvas, crop_from(canvas)


def _open(
    layout: Layout, home: Path, name: str, samples: Samples, sizes: tuple[int, ...], config: DataConfig
) -> Split:
    if samples.pixels is not None:
        return Split(samples.pixels, samples.labels)
    key = hashlib.sha256(f"{home}\0{name}".encode()).hexdigest()[:12]
    folder = cache_folder(config.cache) / f"{layout.name}-{name}-{key}"
    hint = f" (vpns data check {config.root} names all)"
    store, *larger = open_decoded(samples.files, sizes, folder, hint)
    return Split(store, samples.labels, larger=larger[0] if larger else None)


def _carve(
    listing: Listing, splits: dict[str, Split], val_fraction: float, seed: int, home: Path
) -> ImageSet:
    train = splits["train"]
    carved = carve_missing(listing, val_fraction, seed, home)
    splits = splits | {name: train.select(part) for name, part in carved.items()}
    return ImageSet(splits["train"], splits["val"], splits["test"], listing.class_names)


def carve_missing(listing: Listing, val_fraction: float, seed: int, home: Path) -> dict[str, Tensor]:
    """Which training images become which split, by name; nothing where the set has all three.

    Raises:
        ValueError: some split would miss a class.
    """
    labels = listing.splits["train"].labels
    missing = [name for name in ("val", "test") if name not in listing.splits]
    if not missing:
        return {}
    shares = [round(val_fraction * len(labels))] * len(missing)
    parts = carve_splits(labels, shares, seed, listing.class_names, str(home))
    return dict(zip((*missing, "train"), parts, strict=True))
