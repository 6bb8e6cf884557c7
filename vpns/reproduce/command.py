"""How is an experiment done? One pretrained network, a sweep of it, the tests that were fixed, and a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vpns.complaint import EXIT_INTERRUPTED
from vpns.config import RunConfig, flatten
from vpns.files import make_folder, write_json
from vpns.observe import Progress
from vpns.report.arms import Arm, compare_arms, group_arms
from vpns.report.blocks import Section, Table
from vpns.report.compare import write_comparison
from vpns.report.outcome import Row
from vpns.report.several import read_sweep
from vpns.reproduce.arms import ARMS
from vpns.reproduce.channels import EXP3
from vpns.reproduce.experiment import Comparison, DottedSettings, Experiment
from vpns.reproduce.frames import EXP2
from vpns.reproduce.hydra import EXP1
from vpns.reproduce_options import ReproduceOptions
from vpns.run import execute
from vpns.state import SCHEMA_VERSION
from vpns.sweep import Grid, build_grid, run_sweep
from vpns.sweep.command import tell_cost, tell_failures
from vpns_kernels.measure import fingerprint

EXPERIMENTS = {experiment.name: experiment for experiment in (ARMS, EXP1, EXP2, EXP3)}
_FIRST_SEED = 1
# Of the one pretrained network, and none of the experiment's own.
_PRETRAIN_SEED = 0


def do_reproduce(options: ReproduceOptions) -> int:
    """Do what is missing of an experiment; prints what it found, and returns the exit code of a sweep."""
    experiment, sweep = EXPERIMENTS[options.experiment], options.sweep
    try:
        settings = _read_settings(options.config) if options.config else dict(experiment.embedded)
        if sweep.is_dry:
            if options.config is None:
                # Once for all, not once for each reference.
                settings["pretrain.epochs"] = 0
            print(tell_cost(make_grid(experiment, settings, options.seeds), sweep))
            return 0
        if options.config is None:
            settings["model.weights"] = str(_pretrain(sweep.folder.resolve(), settings))
        grid = make_grid(experiment, settings, options.seeds)
        swept = run_sweep(grid, sweep, is_timed=lambda config: config.seed == _FIRST_SEED)
        found = judge(experiment, sweep.folder)
    except KeyboardInterrupt:
        print(f"vpns: interrupted; vpns reproduce {experiment.name} goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    # Where the pretrained network lies is of this machine alone.
    told = {key: value for key, value in settings.items() if key != "model.weights"}
    content = {"schema_version": SCHEMA_VERSION, "machine": fingerprint(), "settings": told} | found
    content |= {"workers": sweep.workers, "threads": sweep.threads, "errors": swept.errors}
    write_json(sweep.folder / f"{experiment.name}.json", content)
    if options.json is not None:
        make_folder(options.json.parent)
        write_json(options.json, content)
    for test in found["tests"]:
        print(tell_test(test))
    print(sweep.folder / "report" / "report.html")
    return tell_failures(swept, sweep.folder)


def make_grid(experiment: Experiment, settings: DottedSettings, seeds: int | None) -> Grid:
    """The experiment's runs; the same but for their number, whoever asks."""
    (run,) = build_grid({"settings": settings, "grid": {"seed": [1]}}).runs
    axes = experiment.build_axes(run.config) | {
        "seed": list(range(_FIRST_SEED, _FIRST_SEED + (seeds or experiment.seeds)))
    }
    return build_grid({"settings": settings, "grid": axes, "until": experiment.until})


def judge(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The experiment's tests and tables, which its page begins with."""
    runs = read_sweep(folder)
    arms = group_arms(runs)
    tests = list(_test(experiment.compare(arms), arms))
    rows = [] if experiment.tabulate is None else list(experiment.tabulate(runs))
    sections = [_show_tests(experiment, tests)]
    if experiment.tell is not None:
        sections.append(experiment.tell(rows))
    write_comparison(runs, folder / "report", experiment.title, sections)
    return {
        "experiment": experiment.name,
        "question": experiment.question,
        "tests": tests,
        "targets": [] if experiment.wanted_points is None else _judge_power(experiment.wanted_points, tests),
        "table": rows,
        "runs": [{"run": run.name, "arm": run.arm, "seed": run.config.seed} | run.row for run in runs],
    }


def tell_test(test: Row) -> str:
    """One comparison in words."""
    return (
        f"{test['second']} against {test['first']}: {test['difference']:+.2f} points "
        f"({test['low']:+.2f} to {test['high']:+.2f}), p = {test['p_value']:.2g}, {test['pairs']} pairs; "
        f"{test['detectable']:.2f} points could be seen"
    )


def _test(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Row]:
    by_name = {arm.name: arm for arm in arms}
    tested = [(one, compare_arms(by_name[one.first], by_name[one.second])) for one in comparisons]
    return [asdict(one) | asdict(test) for one, test in tested if test is not None]


def _judge_power(wanted: float, tests: Sequence[Row]) -> list[Row]:
    """Whether the seeds were enough for what the experiment was to see."""
    return [
        {
            "name": f"{test['second']} against {test['first']}: points that could be seen",
            "value": test["detectable"],
            "wanted": wanted,
            "met": test["detectable"] <= wanted,
        }
        for test in tests
        if test["is_primary"]
    ]


def _show_tests(experiment: Experiment, tests: Sequence[Row]) -> Section:
    header = ("", "pairs", "difference, points", "95 % interval", "p", "detectable, points")
    rows = [
        (
            f"{test['second']} against {test['first']}{' (primary)' if test['is_primary'] else ''}",
            test["pairs"],
            f"{test['difference']:+.2f}",
            f"{test['low']:+.2f} to {test['high']:+.2f}",
            f"{test['p_value']:.2g}",
            f"{test['detectable']:.2f}",
        )
        for test in tests
    ]
    told = (
        "Arms, seeds and test were fixed before the first run: the paired t-test over seeds, two-sided, of "
        "each comparison by itself. What is detectable is the smallest true difference that so many pairs "
        "find with probability 0.8."
    )
    verdicts = [_tell_verdict(test) for test in tests if test["is_primary"]]
    return Section("Result", (experiment.question, *verdicts, Table(header, rows), told))


def _tell_verdict(test: Row) -> str:
    """What a comparison shows, and what it would have missed."""
    head = f"{test['second']} against {test['first']}: {test['difference']:+.2f} points. "
    if test["low"] > 0:
        return head + "The interval lies above 0: a gain is shown."
    if test["high"] < 0:
        return head + "The interval lies below 0: a loss is shown."
    missed = f"a true difference below {test['detectable']:.2f} points may have been missed"
    return head + f"The interval holds 0: no difference is shown; {missed}."


def _pretrain(folder: Path, settings: DottedSettings) -> Path:
    """One network that knows letters, as the paper's runs share one that knows ImageNet."""
    own = {"settings": settings | {"model.weights": None}, "grid": {"seed": [_PRETRAIN_SEED]}}
    (run,) = build_grid(own).runs
    target = folder / "pretrained"
    execute(target, run.config, "pretrain", [Progress()])
    return target


def _read_settings(path: Path) -> DottedSettings:
    """Of a YAML file as `vpns run --config` takes it; seeds are the experiment's."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"reproduce: expected YAML in {path}, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"reproduce: expected settings in {path}, got {type(content).__name__}")
    flat = flatten(content)
    known = flatten(RunConfig().to_dict())
    if unknown := [key for key in flat if key not in known]:
        raise ValueError(f"reproduce: expected settings of a run in {path}, got {', '.join(unknown)}")
    return {key: value for key, value in flat.items() if key != "seed"}
