"""What would a run do? Its settings, the data that are there, and what it would cost; nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml

from vpns.config import RunConfig
from vpns.data import LAYOUTS, load_data
from vpns.data.listing import list_data
from vpns.data.mapped import carve_missing, find_home
from vpns.estimate import Counts, Rates, measure_rates, peak_bytes, stage_seconds
from vpns.label_map import check_enough
from vpns.models.published import split_name
from vpns.models.weights import WEIGHT_LIBRARIES
from vpns.run import check_settings

_UNKNOWN = Counts(0, 0, 0)


def describe_run(config: RunConfig, folder: Path) -> str:
    """Several lines for people.

    Raises:
        ValueError: settings that a run would refuse.
    """
    check_settings(config)
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    data, counts = _describe_data(config)
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip(), "---"]
    lines += [f"folder: {folder}{' (begun already)' if (folder / 'run.json').exists() else ''}"]
    lines += [f"data: {data}", f"weights: {_describe_weights(config)}"]
    rates = measure_rates(config)
    return "\n".join([*lines, *describe_cost(config, rates, counts, threads)])


def describe_cost(config: RunConfig, rates: Rates, counts: Counts, threads: int) -> list[str]:
    """Time and memory, as lines."""
    lines = []
    if counts.train:
        stages = stage_seconds(config, rates, counts)
        told = ", ".join(f"{name} {_time(seconds)}" for name, seconds in stages.items())
        lines.append(f"time: about {_time(sum(stages.values()))} with {threads} threads ({told})")
    else:
        lines.append("time: unknown without the data")
    if torch.device(config.device).type != "cpu":
        return [*lines, f"memory: not estimated on {config.device}"]
    peak = peak_bytes(config, rates, counts if counts.train else Counts(10**9, 0, 0))
    if peak is not None:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        advice = "" if peak < 0.9 * there else "; search.accumulate and tune.accumulate take a batch in parts"
        lines.append(f"memory: about {peak / 2**30:.1f} GiB of {there / 2**30:.0f} GiB{advice}")
    return lines


def _describe_data(config: RunConfig) -> tuple[str, Counts]:
    """What is there, and how many images it has or, as published, will have."""
    name = config.data.name
    layout = LAYOUTS.get(name)
    if layout is None:
        images = load_data(config.data, config.seed, config.prompt.canvas)
        counts = Counts(len(images.train), len(images.val), len(images.test))
        return f"{name}, {_tell(counts, len(images.class_names))}", counts
    expected = _UNKNOWN
    if layout.published is not None:
        share = round(config.data.val_fraction * layout.published.train)
        expected = Counts(layout.published.train - share, share, layout.published.test)
        if config.label_map.kind != "head":
            check_enough(config.model.source_classes, layout.published.classes)
    try:
        home = find_home(layout, config.data.root)
        listing = list_data(layout, home)
    except (FileNotFoundError, ValueError) as error:
        return f"not there: {error}", expected
    if listing.problems:
        return f"incomplete: {listing.problems[0]} (vpns data check {config.data.root})", expected
    if config.label_map.kind != "head":
        check_enough(config.model.source_classes, len(listing.class_names))
    carved = carve_missing(listing, config.data.val_fraction, config.seed, home)
    sizes = {split: len(samples.labels) for split, samples in listing.splits.items()}
    sizes |= {split: len(rows) for split, rows in carved.items()}
    counts = Counts(sizes["train"], sizes["val"], sizes["test"])
    return f"{name} in {config.data.root}, {_tell(counts, len(listing.class_names))}", counts


def _tell(counts: Counts, classes: int) -> str:
    return (
        f"{classes} classes, images: {counts.train:,} train, {counts.val:,} validation, {counts.test:,} test"
    )


def _describe_weights(config: RunConfig) -> str:
    weights = config.model.weights
    if weights is None:
        return "none: letters are learned first" if config.pretrain.epochs else "none: from a random start"
    library, _, name = weights.partition(":")
    if library in WEIGHT_LIBRARIES:
        return f"{name} of {split_name(config.model.name)[1]}, which {library} downloads once"
    return weights if Path(weights).exists() else f"not there: {weights}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
