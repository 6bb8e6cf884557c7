"""What is in a folder of data, and what is missing? Every known layout is looked for, every image decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vpns.data.decode import is_image, read_image
from vpns.data.listing import LAYOUTS, Layout, list_data

_SHOWN = 10


@dataclass(frozen=True)
class FoundData:
    """A data set that was found.

    Args:
        home: where it lies.
        summary: how many classes and images.
        problems: what is wrong, one sentence each; none where it is whole.
    """

    name: str
    home: Path
    summary: str
    problems: tuple[str, ...]


def check_data(root: Path, name: str | None = None, decodes: bool = True) -> list[FoundData]:
    """Every data set of a folder, or the one of this name.

    Args:
        decodes: whether to decode every image, as a run will.

    Raises:
        FileNotFoundError: nothing that is known lies here.
        ValueError: an unknown name.
    """
    if name is not None and name not in LAYOUTS:
        raise ValueError(f"check_data: expected a name in {sorted(LAYOUTS)}, got {name!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"check_data: expected a folder, got {root}")
    wanted = [LAYOUTS[name]] if name is not None else [LAYOUTS[known] for known in sorted(LAYOUTS)]
    places = [(layout, layout.find(root.absolute())) for layout in wanted]
    # Any folder could be one of class folders: looked for by its own name, or if there is nothing else.
    certain = [
        (layout, home) for layout, home in places if home is not None and (name or _is_marked(layout, home))
    ]
    if not certain and name is None and _holds_folders(root):
        certain = [(LAYOUTS["folder"], root.absolute())]
    if not certain:
        known = ", ".join(home for layout in wanted for home in layout.homes if home != ".")
        raise FileNotFoundError(f"check_data: expected a data set, got nothing known in {root} ({known})")
    return [_check(layout, home, decodes) for layout, home in certain]


def to_text(found: list[FoundData]) -> str:
    """A line per data set, and one per problem."""
    lines = []
    for one in found:
        lines.append(f"{one.name}: {one.summary} in {one.home}: {'incomplete' if one.problems else 'whole'}")
        lines += [f"  {problem}" for problem in one.problems]
    return "\n".join(lines)


def _is_marked(layout: Layout, home: Path) -> bool:
    return home.name in {Path(marked).name for marked in layout.homes}


def _holds_folders(root: Path) -> bool:
    return any(path.is_dir() and path.name[0] != "." for path in root.iterdir())


def _check(layout: Layout, home: Path, decodes: bool) -> FoundData:
    try:
        listing = list_data(layout, home)
    except (ValueError, OSError) as error:
        return FoundData(layout.name, home, "not readable", (str(error),))
    counts = ", ".join(
        f"{len(samples.labels):,} images in {name}" for name, samples in listing.splits.items()
    )
    summary, problems = f"{len(listing.class_names)} classes, {counts}", listing.problems
    if ignored := _count_others(layout, home):
        summary = f"{summary} ({ignored:,} files of other types are not read)"
    if decodes:
        files = [
            file
            for samples in listing.splits.values()
            if samples.pixels is None
            for file in samples.files
            if file.is_file()
        ]
        problems = (*problems, *_undecodable(files))
    return FoundData(layout.name, home, summary, problems)


def _count_others(layout: Layout, home: Path) -> int:
    """Files in a user's own class folders that are no images, by their names."""
    if layout.name != "folder":
        return 0
    files = (path for path in home.rglob("*") if path.is_file() and path.parent != home)
    return sum(path.name[0] != "." and not is_image(path) for path in files)


def _undecodable(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Shown on a terminal alone.
        found = [
            why for why in tqdm(pool.map(_try, files), total=len(files), unit="image", disable=None) if why
        ]
    more = [f"and {len(found) - _SHOWN:,} more images that do not decode"] if len(found) > _SHOWN else []
    return [*found[:_SHOWN], *more]


def _try(file: Path) -> str:
    try:
        read_image(file, ())
    except ValueError as error:
        return str(error)
    return ""
