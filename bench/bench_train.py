"""What does training cost? Layers, ops, whole iterations and runs, against the published scheme in torch.

    python -m bench.bench_train --json bench/results/train.json [--quick] [--budget MINUTES] [--only PARTS]

Everything is timed in turn with its opponents, A B A B, in one process; complete runs are processes of their
own. The whole takes hours: with a budget, what matters most is measured first, and the report says what was
left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this file is run and not imported

from bench.bench_ops import LISTS, is_3x3, numbers, words, write_json  # noqa: E402
from bench.plot import plot_iterations  # noqa: E402
from bench.train_layers import Form, bench_passes  # noqa: E402
from bench.train_loops import Arm, Cell, Sizes  # noqa: E402
from bench.train_memory import bench_memory  # noqa: E402
from bench.train_ops import bench_batch_norm, bench_prompt, bench_refresh  # noqa: E402
from bench.train_runs import FORMS, REFERENCE, bench_runs  # noqa: E402
from bench.train_steps import (  # noqa: E402
    bench_iterations,
    extra_arms,
    headline_arms,
    opponents,
)
from bench.train_table import table  # noqa: E402
from bench.train_targets import BATCH, targets  # noqa: E402
from vpns_kernels.measure.fingerprint import fingerprint  # noqa: E402
from vpns_kernels.measure.layers import Layer, read_layers  # noqa: E402
from vpns_kernels.measure.timing import measurement_lock  # noqa: E402
from vpns_kernels.memory import keep_freed_memory  # noqa: E402

PARTS = ("ops", "layers", "steps", "runs")
ENGINES = {"eager": "torch", "compile": "torch.compile"}
DENSITIES, GOAL_DENSITIES, GOAL_DENSITY = (0.5, 0.2, 0.1, 0.05, 0.02), (0.2, 0.1, 0.05), 0.1
BATCHES = (8, 16, 32, 64, 128)
DTYPES = ("float32", "bfloat16")
LAYER_PATTERNS = ("unstructured", "block:32x32")
# Pattern and dtype of whole iterations.
STEP_FORMS = (("unstructured", "float32"), ("block:32x32", "float32"), ("block:32x32", "bfloat16"))
# Where a goal leaves our dtype free.
FREE_FORMS = (("unstructured", "bfloat16"),)
# How often an iteration is timed that serves no goal.
SWEEP_ROUNDS = 2
# Channels and pixels of ResNet-18's residual sums at 224 px.
NORMS = ((64, 56), (128, 28), (256, 14), (512, 7))
# A complete run lasts: rounds of layers to one of runs.
_RUN_ROUNDS = 4
# What the goals of an iteration of two updates are measured against.
TWO_UPDATES = ("torch float32", "torch.compile bfloat16")
QUICK_RUN = ("--search.epochs=6", "--tune.epochs=3", "--pretrain.epochs=1")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Something to measure, for a part of the report; a small rank goes first."""

    part: str
    rank: int
    name: str
    measure: Callable[[], list[Row]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    jobs = [job for part in options.only for job in PLANS[part](options)]
    parts: dict[str, list[Row]] = {job.part: [] for job in jobs}
    stop_at = time.monotonic() + 60 * (float("inf") if options.budget is None else options.budget)
    left_out = []
    # As vpns does; torch's layers gain by it too.
    options.keeps_freed_memory = keep_freed_memory()
    with measurement_lock():
        machine = fingerprint()
        for job in sorted(jobs, key=lambda job: job.rank):
            if time.monotonic() > stop_at:
                left_out.append(job.name)
                continue
            print(job.name, file=sys.stderr, flush=True)
            parts[job.part] += job.measure()
            # After each, so that hours of measuring survive what stops them.
            write_json(options.json, make_report(options, machine, parts, left_out))
        report = make_report(options, machine, parts, left_out)
        write_json(options.json, report)
    plot_iterations(parts.get("steps", []), options.json.with_suffix(".svg"))
    print(table(report))


def make_report(
    options: argparse.Namespace, machine: Row, parts: dict[str, list[Row]], left_out: list[str]
) -> dict[str, Any]:
    """As stored; see the table for what is in it."""
    return {
        "schema_version": 1,
        "fingerprint": machine,
        "settings": vars(options) | {"json": str(options.json), "sizes": asdict(options.sizes)},
        **parts,
        "left_out": left_out,
        "targets": targets(parts),
    }


def plan_ops(options: argparse.Namespace) -> list[Job]:
    """The ops around the convolutions."""
    layers = read_layers(LISTS / "resnet18.txt")
    stem, batch, rounds = layers[0].geometry, options.batch, options.rounds
    jobs = [
        Job(
            "ops",
            0,
            f"prompt_conv2d {variant}",
            lambda variant=variant: [  # type: ignore[misc]
                bench_prompt(stem, variant, batch, options.sizes.canvas, options.sizes.frame, rounds)
            ],
        )
        for variant in ("framed", "released")
    ]
    jobs.append(Job("ops", 0, "select_threshold", lambda: [bench_refresh(layers, GOAL_DENSITY, rounds)]))
    norms = NORMS[:1] if options.quick else NORMS
    for channels, size in norms:
        for dtype in DTYPES:
            measure = partial(bench_batch_norm, channels, size, batch, dtype, rounds)
            jobs.append(
                Job("ops", 2, f"batch_norm_act {channels} at {size} {dtype}", lambda m=measure: [m()])
            )  # type: ignore[misc]
    return jobs


def plan_layers(options: argparse.Namespace) -> list[Job]:
    """All layers; 3x3 in the goals' form first, which is all that a quick report has."""
    jobs = []
    for layer in read_layers(LISTS / "resnet18.txt"):
        if is_3x3(layer):
            densities = [density for density in GOAL_DENSITIES if density in options.densities]
            goals = [Form("tune", "unstructured", density, "float32") for density in densities]
            jobs.append(_layer_job(0, layer, goals, options))
        if options.quick:
            continue
        for density in options.densities:
            forms = [
                Form(stage, pattern, density, dtype)
                for stage in ("tune", "search")
                for pattern in LAYER_PATTERNS
                for dtype in DTYPES
            ]
            if is_3x3(layer):
                forms = [form for form in forms if form not in goals]
            jobs.append(_layer_job(2 if density == GOAL_DENSITY else 3, layer, forms, options))
    return jobs


def _layer_job(rank: int, layer: Layer, forms: list[Form], options: argparse.Namespace) -> Job:
    densities = ", ".join(sorted({f"{form.density:g}" for form in forms}))
    name = f"{layer.name}, density {densities}, {len(forms)} forms"
    return Job("layers", rank, name, partial(bench_passes, layer, options.batch, forms, options.rounds))


def plan_steps(options: argparse.Namespace) -> list[Job]:
    """Whole iterations: the goals' cells; then densities and batches, coarsely first; then the rest."""
    batch = options.batch
    search, tune = (Cell(stage, "framed", batch) for stage in ("search", "tune"))
    released = [Cell(stage, "released", batch) for stage in ("search", "tune")]
    whos = [ENGINES[engine] for engine in options.opponents]
    rivals, rounds = opponents(whos, DTYPES, GOAL_DENSITY), max(2, options.rounds // 2)
    if options.quick:
        blocks = headline_arms([GOAL_DENSITY], STEP_FORMS[2:])
        plain = headline_arms(options.densities, STEP_FORMS[:1])
        goal = [arm for arm in plain if arm.density == GOAL_DENSITY]
        goal += headline_arms([GOAL_DENSITY], FREE_FORMS)
        pair = [arm for arm in rivals if arm.name in TWO_UPDATES]
        halves = [arm for arm in rivals if arm.dtype == "bfloat16"]
        return [
            _step_job(0, released[0], [*pair, *goal, *blocks], options, rounds),
            _step_job(0, tune, [*rivals, *plain, *blocks], options, rounds),
            _step_job(0, search, [*halves, *blocks], options, rounds),
        ]
    ours = headline_arms([GOAL_DENSITY], STEP_FORMS)
    goals = [
        density for density in GOAL_DENSITIES if density in options.densities and density != GOAL_DENSITY
    ]
    graded = [*ours, *headline_arms(goals, STEP_FORMS[:1])]
    extras = [*extra_arms(ours[0]), *extra_arms(ours[2])]
    # Scores of blocks start by rank within the layer: the method's start is the uniform one.
    extras = [arm for arm in extras if arm.start == "uniform" or arm.pattern == "unstructured"]
    jobs = [
        _step_job(
            0, released[0], [*rivals, *ours, *headline_arms([GOAL_DENSITY], FREE_FORMS)], options, rounds
        ),
        _step_job(0, tune, [*rivals, *graded], options, rounds),
        _step_job(1, search, [*rivals, *ours, *extras], options, rounds),
        *_sweeps(search, ours, options),
        *_sweeps(tune, graded, options),
        _step_job(2, released[1], [*rivals, *ours], options, rounds),
    ]
    if options.budget is not None:
        arms = [*opponents(["torch"], DTYPES, GOAL_DENSITY), *ours]
        jobs += [
            Job("memory", 2, f"memory of {cell.name}", partial(bench_memory, cell, arms, options.sizes))
            for cell in (released[0], tune)
        ]
    return jobs


def _sweeps(cell: Cell, measured: list[Arm], options: argparse.Namespace) -> list[Job]:
    """Other densities and the ends of the batches in two forms; later the third form, and batches between."""
    coarse = [STEP_FORMS[0], STEP_FORMS[2]]
    jobs = []
    for rank, forms in ((1, coarse), (3, STEP_FORMS[1:2])):
        arms = [arm for arm in headline_arms(options.densities, forms) if arm not in measured]
        if arms:
            jobs.append(_step_job(rank, cell, arms, options, SWEEP_ROUNDS, "densities of "))
    others = sorted(size for size in options.batches if size != options.batch)
    for size in others:
        rank = 1 if size in (others[0], others[-1]) else 3
        arms = headline_arms([GOAL_DENSITY], coarse)
        jobs.append(_step_job(rank, replace(cell, batch=size), arms, options, SWEEP_ROUNDS))
    return jobs


def _step_job(
    rank: int, cell: Cell, arms: list[Arm], options: argparse.Namespace, rounds: int, what: str = ""
) -> Job:
    measure = partial(bench_iterations, cell, arms, options.sizes, rounds)
    return Job("steps", rank, f"{what}{cell.name}", measure)


def plan_runs(options: argparse.Namespace) -> list[Job]:
    """Complete runs of the embedded task; a quick report trains a tenth of the epochs."""
    if options.quick:
        measure = partial(bench_runs, 1, QUICK_RUN, (FORMS[1], REFERENCE))
    else:
        measure = partial(bench_runs, max(1, options.rounds // _RUN_ROUNDS), ())
    return [Job("runs", 1, "runs, letters to digits", measure)]


PLANS = {"ops": plan_ops, "layers": plan_layers, "steps": plan_steps, "runs": plan_runs}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="what the goals read: under 3 minutes")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="of measuring; with peak memory too")
    parser.add_argument("--only", type=words, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    engines = ",".join(ENGINES)
    parser.add_argument("--opponents", type=words, help=f"some of {engines}; --quick leaves out compiling")
    parser.add_argument("--densities", type=numbers(float))
    parser.add_argument("--batches", type=numbers(int), default=list(BATCHES), help="of whole iterations")
    parser.add_argument("--batch", type=int, default=BATCH, help="of everything else")
    parser.add_argument("--rounds", type=int, help="how often each is timed; iterations half as often")
    options = parser.parse_args(arguments)
    options.densities = options.densities or list(GOAL_DENSITIES if options.quick else DENSITIES)
    options.opponents = options.opponents or (["eager"] if options.quick else list(ENGINES))
    options.rounds = options.rounds or (5 if options.quick else 11)
    options.sizes = Sizes()
    for name, known in (("only", PARTS), ("opponents", tuple(ENGINES))):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if not all(0 < density <= 1 for density in options.densities):
        parser.error(f"--densities: expected kept fractions in (0, 1], got {options.densities}")
    if min(options.batch, options.rounds, *options.batches) < 1:
        parser.error("--batch, --batches, --rounds: expected numbers of at least 1")
    return options


if __name__ == "__main__":
    main()
