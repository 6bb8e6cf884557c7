"""How does a run go? Its stages in order, each done once; the same call again goes on where it stopped.

A run folder holds
    run.json                        the settings, the threads and the versions it began with
    metrics.jsonl, metrics.csv      one row per trained epoch
    <stage>/stage.json              written last: results, and the SHA-256 of the stage's files
    pretrain/weights.safetensors    state dict before the task, with the source head
    dense/weights.safetensors       the dense reference
    search/{masks,scores,prompt,network}.safetensors
                                    masks and scores of units by layer; what else of the network moved
    tune/{weights,masks,prompt}.safetensors
                                    the pruned network as a plain state dict, zeros in place
    eval/outputs.safetensors        logits of each test image
    export/, bench/bench.json       the artifact, and its timings
    report/report.md, report.json   the write-up, with its tables and plots
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from vpns.config import RunConfig, differing_keys
from vpns.data import DATASETS, LAYOUTS
from vpns.data.letters import LETTERS
from vpns.files import read_json, write_json
from vpns.group import Group, join_group
from vpns.label_map import check_enough
from vpns.methods import find_method
from vpns.observe import End, Observer
from vpns.prompt import build_prompt
from vpns.stages import STAGES, Context, Stage
from vpns.stages.context import check_device
from vpns.stages.networks import effective_prompt, stage_passes
from vpns.stages.pretrain import learns_letters
from vpns.state import (
    SCHEMA_VERSION,
    StageRecord,
    begin_stage,
    finish_stage,
    list_outputs,
    lock_folder,
    read_stage,
)
from vpns_kernels.memory import keep_freed_memory
from vpns_kernels.patterns import parse_pattern

# Stages that the processes of a group do together.
_TRAINING = ("pretrain", "dense", "search", "tune")


def execute(
    folder: Path,
    config: RunConfig,
    until: str = "report",
    observers: Sequence[Observer] = (),
    checks: bool = False,
) -> dict[str, StageRecord]:
    """Do what is still missing of a run, up to a stage and with all that this stage needs.

    Args:
        checks: whether search and tune first compare their kernels with the dense reference.

    Returns:
        The record of each finished stage, by name.

    Raises:
        ValueError: settings that cannot be, or differ from those the folder was begun with; a damaged file.
        OSError: a folder that cannot be written, a full disk, another process in the folder.
        FloatingPointError: training that diverged; the last saved state stays.
        KeyboardInterrupt: Ctrl-C, after the state was saved.
    """
    check_settings(config)
    keep_freed_memory()
    with join_group() as group, _own_folder(folder, group) as own:
        config = _open_run(own, config, group)
        context = Context(own, config, observers if group.rank == 0 else (), group=group, checks=checks)
        try:
            for stage in _needed(until, config):
                # What follows training is for one process alone.
                if group.rank > 0 and stage.name not in _TRAINING:
                    break
                context.finished[stage.name] = _do_once(context, stage)
        except Exception:
            if not _holds_work(own):
                # Settings that came to nothing are nobody's defaults.
                (own / "run.json").unlink(missing_ok=True)
            raise
        return context.finished


def load_config(folder: Path) -> RunConfig:
    """The settings that a run folder was begun with."""
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"load_config: expected a run folder with run.json, got {folder}")
    content = read_json(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"load_config: expected a run of schema_version {SCHEMA_VERSION} in {path}")
    try:
        return RunConfig.from_dict(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_config: expected the settings of a run in {path}, got {error!r}") from error


def open_finished(folder: Path) -> Context:
    """A run folder for reading: its settings and the records of its finished stages."""
    context = Context(folder, load_config(folder))
    records = {stage.name: read_stage(context.stage_folder(stage.name)) for stage in STAGES}
    context.finished = {name: record for name, record in records.items() if record is not None}
    return context


def check_settings(config: RunConfig) -> None:
    """Refuse before any work what the registries and devices of this installation cannot do."""
    method = find_method(config.method)
    if config.data.name not in DATASETS:
        raise ValueError(f"run: expected data.name in {sorted(DATASETS)}, got {config.data.name!r}")
    parse_pattern(config.pattern).check_density(config.density)
    build_prompt(config.prompt)
    published = LAYOUTS[config.data.name].published if config.data.name in LAYOUTS else None
    if published is not None and config.label_map.kind != "head":
        # Found before many images are decoded in vain.
        check_enough(config.model.source_classes, published.classes)
    check_device(config.device)
    if learns_letters(config) and config.model.source_classes != len(LETTERS):
        raise ValueError(
            f"run: expected model.source_classes={len(LETTERS)} to learn letters, got "
            f"{config.model.source_classes} (or give model.weights, or set pretrain.epochs=0)"
        )
    if config.schedule != "joint":
        prompt = effective_prompt(config)
        is_learned = (
            prompt.kind != "none" and not prompt.frozen and stage_passes(config, "search")[0].prompted
        )
        if not is_learned or not method.learns_scores or config.search.epochs < 2:
            raise ValueError(
                f"run: expected scores and a prompt that are learned in at least 2 epochs of search with "
                f"schedule={config.schedule}, got method={config.method}, prompt={prompt}"
            )


@contextmanager
def _own_folder(folder: Path, group: Group) -> Iterator[Path]:
    """The run's folder for the first process; for others a copy, which goes with them.

    All processes compute the same, so that what the others write is never needed again.
    """
    if group.rank == 0:
        with lock_folder(folder):
            group.wait()  # for the folder to be there
            group.wait()  # for the others to have their copies
            yield folder
        return
    group.wait()
    with tempfile.TemporaryDirectory(prefix="vpns-") as temporary:
        own = Path(temporary) / folder.name
        shutil.copytree(folder, own, ignore=shutil.ignore_patterns("run.lock"))
        group.wait()
        yield own


def _open_run(folder: Path, config: RunConfig, group: Group) -> RunConfig:
    """Write the settings down, or check them against those the folder was begun with; set the threads."""
    path = folder / "run.json"
    if (folder / "sweep.json").exists():
        raise ValueError(
            f"run: expected the folder of a run, got {folder} of a sweep (its runs lie in runs/)"
        )
    if path.exists() and _holds_work(folder):
        begun = read_json(path)
        keys = differing_keys(config, RunConfig.from_dict(begun["config"]))
        if keys:
            raise ValueError(
                f"run: expected the settings that {folder} was begun with, got others for {', '.join(keys)} "
                "(take another folder)"
            )
        threads = int(begun["threads"])
        if begun.get("processes", 1) != group.size:
            raise ValueError(
                f"run: expected the {begun.get('processes', 1)} processes that {folder} was begun with, "
                f"got {group.size}"
            )
    else:
        threads = config.threads or torch.get_num_threads()
        versions = {"torch": str(torch.__version__)}
        content = {"config": config.to_dict(), "threads": threads, "processes": group.size}
        content |= {"versions": versions}
        write_json(path, {"schema_version": SCHEMA_VERSION} | content)
    # Another thread count sums in another order, and a resumed run would end with other weights.
    torch.set_num_threads(threads)
    return replace(config, threads=threads)


def _holds_work(folder: Path) -> bool:
    """Whether any stage has finished or saved its state; until then a mistyped setting can be mended."""
    stages = [folder / stage.name for stage in STAGES]
    return any((stage / name).exists() for stage in stages for name in ("stage.json", "state.json"))


def _needed(until: str, config: RunConfig) -> list[Stage]:
    """The stages that a stage rests on, and itself, in order."""
    by_name = {stage.name: stage for stage in STAGES}
    wanted, names = [until], set()
    while wanted:
        name = wanted.pop()
        names.add(name)
        wanted += _inputs(by_name[name], config)
    return [stage for stage in STAGES if stage.name in names]


def _inputs(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    needs_dense = stage.name == "search" and find_method(config.method).needs_fine_tuned
    return (*stage.needs, "dense") if needs_dense else stage.needs


def _do_once(context: Context, stage: Stage) -> StageRecord:
    folder = context.stage_folder(stage.name)
    inputs = {name: context.finished[name].digest for name in _inputs(stage, context.config)}
    record = read_stage(folder)
    if record is not None and record.inputs == inputs:
        return record
    # Where what it was built on has been made anew, with another outcome, the stage begins anew too.
    begin_stage(folder, inputs)
    started_at = time.monotonic()
    try:
        result = stage.run(context)
    finally:
        context.metrics.write_csv()
    record = StageRecord(result, list_outputs(folder), inputs)
    finish_stage(folder, record)
    seconds = result.get("seconds", time.monotonic() - started_at)
    for observer in context.observers:
        observer.on_end(End(stage.name, result, seconds))
    return record
