"""What does a data set on disk hold? Its files and labels by split, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SHOWN_FILES = 3


@dataclass(frozen=True, eq=False)
class Samples:
    """One split on disk.

    Args:
        files: image files, or those that hold the pixels.
        labels: int64 [N].
        pixels: uint8 [N, 3, H, W] where the files hold them decoded; None where each file is an image.
    """

    files: tuple[Path, ...]
    labels: Tensor
    pixels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Listing:
    """A data set on disk; labels index class_names.

    Args:
        splits: "train", and what else the set has of "val" and "test".
        problems: what is wrong, one sentence each.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Samples]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """What its authors published of a data set."""

    classes: int
    train: int
    test: int


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Args:
        name: as data.name calls it.
        homes: folders that mark it, relative to data.root.
        marker: what such a folder must hold.
        read: lists what its home holds; ValueError where that cannot be understood at all.
        side: of all its images in pixels; 0 where they differ.
        published: None for a set that nobody published.
        download: fetches it into data.root; None where nobody offers it for download.
        hint: where it is to be had, or how else.
    """

    name: str
    homes: tuple[str, ...]
    read: Callable[[Path], Listing]
    marker: str = ""
    side: int = 0
    published: Published | None = None
    download: Callable[[Path], None] | None = None
    hint: str = ""

    def find(self, root: Path) -> Path | None:
        """Its home at or below this folder; None where it is not there."""
        for home in map(Path, self.homes):
            # The root may be above its home, half-way down to it, or the home itself.
            for depth in range(len(home.parts) + 1):
                place = root.joinpath(*home.parts[depth:])
                is_there = place.is_dir() and (place / self.marker).exists()
                if is_there and root.parts[len(root.parts) - depth :] == home.parts[:depth]:
                    return place
        return None


LAYOUTS: dict[str, Layout] = {}


def list_data(layout: Layout, home: Path) -> Listing:
    """The listing with all problems: the layout's own, missing files, counts that are not as published."""
    listing = layout.read(home)
    return Listing(
        listing.class_names,
        listing.splits,
        (*listing.problems, *_missing_files(listing, home), *_wrong_counts(listing, layout)),
    )


def join(*parts: Samples) -> Samples:
    """One split of several."""
    files = tuple(file for part in parts for file in part.files)
    return Samples(files, torch.cat([part.labels for part in parts]))


def name_some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN_FILES])
    return shown if len(names) <= _SHOWN_FILES else f"{shown} and {len(names) - _SHOWN_FILES:,} more"


def _missing_files(listing: Listing, home: Path) -> list[str]:
    problems = []
    for split, samples in listing.splits.items():
        missing = [str(file.relative_to(home)) for file in samples.files if not file.is_file()]
        if missing:
            count = f"{len(missing):,} of {len(samples.files):,}"
            problems.append(f"{split} lacks {count} files: {name_some(missing)}")
    return problems


def _wrong_counts(listing: Listing, layout: Layout) -> list[str]:
    published, problems = layout.published, []
    if published is None:
        return []
    if len(listing.class_names) != published.classes:
        problems.append(f"expected {published.classes} classes, got {len(listing.class_names)}")
    for split, count in (("train", published.train), ("test", published.test)):
        found = len(listing.splits[split].labels)
        if found != count:
            problems.append(f"expected {count:,} images in {split}, got {found:,}")
    return problems
