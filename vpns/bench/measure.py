"""How is a network's speed measured? Every pattern, density, batch and size, under the measurement lock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vpns.bench.subject import BenchSubject, load_subject
from vpns.bench_options import BenchOptions
from vpns_kernels.measure import fingerprint, measurement_lock
from vpns_kernels.measure.gpu import gpu_fingerprint
from vpns_kernels.measure.network_targets import network_targets
from vpns_kernels.measure.on_gpu import find_gpu, find_gpu_rivals, gpu_clock
from vpns_kernels.measure.random_network import kept_frac, prune_randomly, scale_weights
from vpns_kernels.measure.whole_network import Clock, Settings, bench_whole, find_rivals
from vpns_kernels.patterns import Pattern, parse_pattern

SCHEMA_VERSION = 1
_PATTERN, _DENSITY, _SIZE = "block", 0.1, 224


def bench_model(options: BenchOptions) -> dict[str, Any]:
    """The report, of plain values: the figures of the first cell, all `cells`, `targets`, and the machine.

    Raises:
        ValueError: options that the network cannot have, or a device that is not there.
        NotImplementedError: a dense engine that was asked for and is not there.
    """
    on_cpu = options.device == "cpu"
    device = torch.device("cpu") if on_cpu else find_gpu(options.device)
    subjects = [load_subject(name, device) for name in options.models]
    kinds = [_kinds(subject, options) for subject in subjects]
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        with measurement_lock():
            cells = [
                cell
                for subject, mine in zip(subjects, kinds, strict=True)
                for cell in _cells(subject, mine, options, device)
            ]
            machine = fingerprint() if on_cpu else gpu_fingerprint(device)
    finally:
        torch.set_num_threads(before)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    # Of what is printed, not of what is measured.
    del settings["shows_goals"]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": settings | {"json": None if options.json is None else str(options.json)},
        **{key: value for key, value in cells[0].items() if key != "layers"},
        "cells": cells,
        "targets": network_targets(cells),
    }


def _kinds(subject: BenchSubject, options: BenchOptions) -> list[tuple[Pattern | None, float]]:
    """Patterns and densities; of a network that is pruned already its own."""
    if subject.is_pruned:
        if options.patterns or options.densities:
            raise ValueError(
                f"bench: expected no --pattern and --density for {subject.name!r}, which is pruned already, "
                f"got {', '.join([*options.patterns, *map(str, options.densities)])}"
            )
        pattern = None if subject.pattern is None else parse_pattern(subject.pattern)
        return [(pattern, kept_frac(subject.network) if subject.density is None else subject.density)]
    patterns = [parse_pattern(spec) for spec in options.patterns or (_PATTERN,)]
    densities = options.densities or (_DENSITY,)
    return [(pattern, pattern.check_density(density)) for pattern in patterns for density in densities]


def _cells(
    subject: BenchSubject,
    kinds: list[tuple[Pattern | None, float]],
    options: BenchOptions,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    dense = subject.network if subject.is_pruned else scale_weights(subject.network)
    on_cpu = options.device == "cpu"
    settings = Settings(
        options.rounds,
        options.layer_rounds,
        dtype=options.dtype,
        engine=subject.engine,
        clock=Clock() if on_cpu else gpu_clock(device),
    )
    sizes = options.sizes or (subject.size or _SIZE,)
    if subject.engine is not None and set(sizes) != {subject.size}:
        raise ValueError(f"bench: expected --size {subject.size} of {subject.name!r}, got {list(sizes)}")
    for size in sizes:
        _expect_taken(subject.name, dense, size)
        for batch in options.batches:
            x = _images(batch, size)
            _say(f"{subject.name}: {size} px, batch {batch}: getting the dense engines ready")
            given = x.to(device)
            rivals = (find_rivals if on_cpu else find_gpu_rivals)(dense, given, options.opponents)
            for pattern, density in kinds:
                spec = "as found" if pattern is None else pattern.spec
                _say(f"{subject.name}: {size} px, batch {batch}: {spec} at density {density:g}")
                pruned = _pruned(subject, dense, pattern, density, x, options.seeds)
                cell = bench_whole(rivals, pruned, pattern, given, settings)
                yield {
                    "model": subject.name,
                    "pattern": spec,
                    "family": "" if pattern is None else pattern.name,
                    "density": density,
                    "batch": batch,
                    "size": size,
                } | cell


@torch.no_grad()
def _expect_taken(name: str, network: nn.Module, size: int) -> None:
    """Refuse a size that the network does not take, in words that name the option."""
    try:
        network(_images(1, size))
    except Exception as error:
        # A user's own forward may raise anything.
        raise ValueError(
            f"bench: expected a network that takes images [N, 3, {size}, {size}], got {name!r}: "
            f"{type(error).__name__}: {error} (--size sets the size)"
        ) from error


def _pruned(
    subject: BenchSubject, dense: nn.Module, pattern: Pattern | None, density: float, x: Tensor, seeds: int
) -> Iterator[nn.Module]:
    if subject.is_pruned or pattern is None:
        yield dense
        return
    for seed in range(seeds):
        yield prune_randomly(dense, pattern, density, seed, x)


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
