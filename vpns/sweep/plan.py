"""Which jobs make a grid, and in which folder? One dense reference for all runs that would train the same."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from vpns.config import PromptConfig, RunConfig, differing_keys
from vpns.files import make_folder, read_json, write_json
from vpns.models import build_model
from vpns.run import check_settings
from vpns.state import SCHEMA_VERSION
from vpns.sweep.grid import Grid
from vpns.sweep.job import Job

_MANIFEST = "sweep.json"
# What may lie in a sweep's folder before it is one: its lock, and the network that an experiment pretrains.
_BEFORE = {"run.lock", "pretrained"}


def open_sweep(folder: Path, grid: Grid, threads: int) -> int:
    """Write down what is swept, or check it against what the folder was begun with; runs may be added.

    Returns:
        The threads of each run: those it was begun with.

    Raises:
        ValueError: settings that cannot be; a folder of something else, or of another sweep.
    """
    for run in grid.runs:
        try:
            check_settings(run.config)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from error
    _check_networks(grid)
    path = folder / _MANIFEST
    if path.exists():
        begun = read_json(path)
        _check_same(folder, begun, grid)
        threads = int(begun["threads"])
    elif folder.exists() and (others := sorted({p.name for p in folder.iterdir()} - _BEFORE)):
        raise ValueError(
            f"sweep: expected an empty folder or one of a sweep, got {folder} with {others[0]} "
            "(take another: --folder)"
        )
    make_folder(folder)
    runs = {run.name: {"choices": run.choices, "settings": run.config.to_dict()} for run in grid.runs}
    content = {"schema_version": SCHEMA_VERSION, "until": grid.until, "threads": threads, "runs": runs}
    write_json(path, content)
    return threads


def _check_networks(grid: Grid) -> None:
    """Build each network once, without its weights: a mistyped name should stop no sweep half-way."""
    for model in dict.fromkeys(replace(run.config.model, weights=None) for run in grid.runs):
        try:
            build_model(model, model.source_classes, seed=0)
        except (ValueError, TypeError) as error:
            raise type(error)(f"sweep: {error}") from error


def plan_jobs(grid: Grid, folder: Path, threads: int) -> list[Job]:
    """Every dense reference, followed by the runs, up to their test, that begin with it."""
    references: dict[str, Job] = {}
    runs: dict[str, list[Job]] = {}
    # Processes of a cluster need not stand in the same folder as this one.
    folder = folder.resolve()
    for run in grid.runs:
        config = replace(run.config, threads=threads)
        shared = dense_settings(config)
        key = _name_reference(shared)
        if key not in references:
            at = folder / "dense" / key
            references[key] = Job(f"dense-{key}", at, shared, "dense", folder / "logs" / f"dense-{key}.log")
        reference, log = references[key], folder / "logs" / f"{run.name}.log"
        job = Job(run.name, folder / "runs" / run.name, config, "eval", log, reference.folder, reference.name)
        runs.setdefault(key, []).append(job)
    return [job for key, reference in references.items() for job in (reference, *runs[key])]


def dense_settings(config: RunConfig) -> RunConfig:
    """The settings of a run that pretraining and dense depend on; the rest is the same for all."""
    prompt = PromptConfig(
        kind="none", canvas=config.prompt.canvas, frame=0, variant=config.prompt.variant, prompt_in="none"
    )
    return RunConfig(
        data=config.data,
        model=config.model,
        label_map=config.label_map,
        pretrain=config.pretrain,
        tune=config.tune,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        save_every_s=config.save_every_s,
        prompt=prompt,
        method="random",
        pattern="unstructured",
        density=1.0,
    )


def _name_reference(config: RunConfig) -> str:
    """What it is for people, and a digest of all it depends on."""
    settings = config.to_dict()
    del settings["save_every_s"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    words = re.sub(r"[^A-Za-z0-9.]+", "_", f"{config.data.name} {config.model.name} seed{config.seed}")
    return f"{words}-{digest[:8]}"


def _check_same(folder: Path, begun: dict[str, object], grid: Grid) -> None:
    """Every run that the folder knows must be among those of the grid, with the same settings."""
    asked = {run.name: run.config for run in grid.runs}
    hint = "take another folder: --folder"
    known = begun.get("runs")
    if not isinstance(known, dict) or begun.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"sweep: expected a sweep of schema_version {SCHEMA_VERSION} in {folder} ({hint})")
    if begun["until"] != grid.until:
        raise ValueError(f"sweep: expected until={begun['until']} as in {folder}, got {grid.until} ({hint})")
    for name, stored in known.items():
        if name not in asked:
            raise ValueError(f"sweep: expected the sweep in {folder}, with {name}, got another ({hint})")
        if keys := differing_keys(asked[name], RunConfig.from_dict(stored["settings"])):
            raise ValueError(
                f"sweep: expected {name} with the settings that {folder} was begun with, "
                f"got others for {', '.join(keys)} ({hint})"
            )
