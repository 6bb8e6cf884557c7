"""Flowers102 in the paper's splits (Zhou et al. 2022): 5,726 images to train on, 2,463 to test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vpns.data.listing import Layout, Listing, Published, Samples, join, name_some
from vpns.data.mapped import register_layout
from vpns.files import read_json

_SPLITS = "split_zhou_OxfordFlowers.json"


def read_flowers_coop(home: Path) -> Listing:
    """Files, labels and class names by the JSON of the splits; trained on train and val together."""
    content = read_json(home / _SPLITS)
    try:
        rows = {
            name: [(str(f), int(c), str(n)) for f, c, n in content[name]] for name in ("train", "val", "test")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_flowers102-coop: expected rows of file, label and name, got others in {home / _SPLITS}"
        ) from error
    names: dict[int, set[str]] = {}
    for _, label, name in (row for split in rows.values() for row in split):
        names.setdefault(label, set()).add(name)
    problems = [
        f"label {label} has several names: {name_some(sorted(n))}" for label, n in names.items() if len(n) > 1
    ]
    if sorted(names) != list(range(len(names))):
        problems.append(f"labels do not count from 0 to {len(names) - 1}")
    class_names = tuple(min(names[label]) for label in sorted(names))
    samples = {name: _samples(home, split) for name, split in rows.items()}
    splits = {"train": join(samples["train"], samples["val"]), "test": samples["test"]}
    return Listing(class_names, splits, tuple(problems))


def _samples(home: Path, rows: list[Any]) -> Samples:
    files = tuple(home / "jpg" / file for file, _, _ in rows)
    return Samples(files, torch.tensor([label for _, label, _ in rows], dtype=torch.int64))


register_layout(
    Layout(
        name="flowers102-coop",
        homes=("oxford_flowers", "flowers-102"),
        marker=_SPLITS,
        read=read_flowers_coop,
        published=Published(102, 5_726, 2_463),
        hint=f"the images of flowers102 in jpg/, and {_SPLITS} of CoOp beside it",
    )
)
