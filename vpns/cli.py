"""What does the command `vpns` do? One sub-command per stage: it does what is missing up to that stage."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vpns.bench_options import find_bench, parse_bench
from vpns.complaint import EXIT_INTERRUPTED, USER_ERRORS, describe_error
from vpns.config import RunConfig, flatten
from vpns.data_command import parse_data, run_data
from vpns.option_help import describe_options
from vpns.preset_files import find_preset, list_presets
from vpns.report_options import find_comparison, parse_comparison
from vpns.reproduce_options import parse_reproduce
from vpns.sweep_options import parse_sweep

Format = Literal["artifact", "onnx", "torch"]

EXIT_ERROR = 2
# Commands that look at what a run has made.
_LAST = ("eval", "export", "bench", "report")
COMMANDS = {
    "run": "every stage, from a network to a report",
    "pretrain": "teach the network letters, or take the weights it is given",
    "dense": "fine-tune the dense reference",
    "search": "find mask and prompt",
    "tune": "train what the mask keeps",
    "eval": "test, once",
    "export": "write the artifact",
    "bench": "time sparse against dense (of any network: vpns bench --model NAME --help)",
    "report": "write report.html and report.json (of several runs: vpns report RUN RUN ...)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 after an error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if list(arguments[:1]) == ["doctor"]:
            return _examine(arguments)
        if list(arguments[:1]) == ["sweep"]:
            return _sweep(arguments[1:])
        if list(arguments[:1]) == ["reproduce"]:
            return _reproduce(arguments[1:])
        if (options := find_comparison(arguments)) is not None:
            return _compare(options)
        if (options := find_bench(arguments)) is not None:
            return _bench(options)
        if list(arguments[:1]) == ["data"]:
            return 0 if run_data(parse_data(arguments[1:])) else EXIT_ERROR
        asked = parse(arguments)
        _expect_run(asked, arguments)
    except (ArgumentError, *USER_ERRORS) as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("vpns: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    # Importing torch takes a second, which --help and a mistyped option should not.
    from vpns.observe import Progress
    from vpns.run import execute

    try:
        if asked.is_dry:
            from vpns.dry_run import describe_run

            print(describe_run(asked.config, asked.folder))
            return 0
        if asked.downloads:
            from vpns.data.download import fetch_data

            fetch_data(asked.config.data.name, asked.config.data.root)
        until = "report" if asked.command == "run" else asked.command
        execute(asked.folder, asked.config, until, [Progress()], checks=asked.checks)
        if asked.format in ("onnx", "torch"):
            from vpns.exchange import export_as

            print(export_as(asked.folder, asked.format))
    except USER_ERRORS as error:
        if asked.is_debug:
            raise
        return _complain(error)
    except KeyboardInterrupt:
        print(f"vpns: interrupted; `vpns {asked.command} {asked.folder}` goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Args:
        is_debug: whether to show tracebacks.
        checks: whether search and tune compare their kernels with the dense reference before they train.
        format: what `export` writes beside the artifact.
        downloads: whether to fetch the data set first, where it is not there.
        is_dry: whether to say what would be done, and do nothing.
    """

    folder: Path
    command: str
    config: RunConfig
    is_debug: bool = False
    checks: bool = False
    format: Format = "artifact"
    downloads: bool = False
    is_dry: bool = False


def parse(arguments: Sequence[str]) -> Asked:
    """What to do, with all settings.

    Without --config, a folder that was begun already gives the settings that the command line does not.
    """
    command, chosen = _parse_with({}, arguments)
    folder = _find_folder(chosen)
    if chosen.config is None and (folder / "run.json").exists():
        from vpns.run import load_config

        stored = flatten(load_config(folder).to_dict())
        command, chosen = _parse_with(stored, arguments)
    values = chosen.as_dict()
    config = RunConfig.from_dict({field.name: values[field.name] for field in dataclasses.fields(RunConfig)})
    return Asked(
        folder,
        command,
        config,
        is_debug=chosen.debug,
        checks=chosen.check,
        format=chosen.get("format") or "artifact",
        downloads=chosen.download,
        is_dry=chosen.dry_run,
    )


def _expect_run(asked: Asked, arguments: Sequence[str]) -> None:
    """Refuse to start a run, of no settings, where a command looks at what one has made."""
    names = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    is_bare = names <= {"--debug", "--check", "--dry-run", "--format", "--run-folder"}
    if asked.command in _LAST and is_bare and not (asked.folder / "run.json").exists():
        hint = f"vpns run {asked.folder} starts one"
        raise ValueError(f"{asked.command}: expected the folder of a run, got {asked.folder} ({hint})")


def _parse_with(defaults: dict[str, Any], arguments: Sequence[str]) -> tuple[str, Namespace]:
    ahead, others = _split_config(arguments)
    # --config ahead, so that an option overrides the file wherever it stands.
    ordered = others[:1] + ahead + others[1:]
    try:
        namespace = _build_parser(arguments, defaults).parse_args(ordered)
    except ArgumentError as error:
        if not ahead or not str(error).startswith("Problems parsing config"):
            raise
        # What YAML cannot read is described by its place, but not by its file.
        files = ", ".join(word.removeprefix("--config=") for word in ahead if word != "--config")
        raise ValueError(f"--config: expected YAML, got {files} ({error})") from error
    return namespace.command, namespace[namespace.command]


def _split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """--config with its file, after that of a --preset, and all other arguments."""
    presets: list[str] = []
    ahead: list[str] = []
    others: list[str] = []
    taker = None
    for argument in arguments:
        kind, _, value = (taker, "", argument) if taker else argument.partition("=")
        is_alone = taker is None and argument in ("--config", "--preset")
        if kind == "--preset":
            others.append(argument)
            presets += [] if is_alone else [f"--config={find_preset(value)}"]
        else:
            (ahead if kind == "--config" else others).append(argument)
        taker = argument if is_alone else None
    return presets + ahead, others


def _build_parser(arguments: Sequence[str], defaults: dict[str, Any]) -> ArgumentParser:
    """Every sub-command; only those among the arguments get their settings, which take long to add."""
    parser = ArgumentParser(
        prog="vpns",
        description="Prune a vision network with a visual prompt, and measure what that gains.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command")
    for name, help_text in COMMANDS.items():
        command = ArgumentParser(exit_on_error=False)
        command.add_argument("--config", action="config", help="YAML file of settings; options override it")
        command.add_argument("folder", nargs="?", help="run folder; made if it is missing")
        command.add_argument("--run-folder", "--run_folder", dest="run_folder", help="the same, as an option")
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        check = "before search and tune train, compare 20 iterations with the dense reference"
        command.add_argument("--check", action="store_true", help=check)
        fetch = "fetch data.name into data.root first, where it is not there"
        command.add_argument("--download", action="store_true", help=fetch)
        dry = "say what would be done: settings, data, time and memory; do nothing"
        command.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true", help=dry)
        command.add_argument("--preset", type=str, help=f"settings of the paper: {', '.join(list_presets())}")
        if name == "export":
            command.add_argument(
                "--format", type=Format, default="artifact", help="also as ONNX, or as torch's state_dict"
            )
        if name in arguments:
            command.add_class_arguments(RunConfig, nested_key=None)
            describe_options(command, RunConfig)
            command.set_defaults(defaults)
        commands.add_subcommand(name, command, help=help_text)
    data = ArgumentParser(exit_on_error=False)  # Listed here, parsed by vpns.data_command.
    commands.add_subcommand("data", data, help="check a folder of images, or download a published data set")
    doctor = ArgumentParser(exit_on_error=False)
    doctor.add_argument("--json", action="store_true", help="for programs")
    sweep = ArgumentParser(exit_on_error=False)
    experiment = ArgumentParser(exit_on_error=False)
    commands.add_subcommand("reproduce", experiment, help="a whole experiment: arms, exp1, exp2 or exp3")
    commands.add_subcommand("sweep", sweep, help="many runs: every combination of a grid of settings")
    commands.add_subcommand("doctor", doctor, help="say what this machine can run and what to expect of it")
    return parser


def _examine(arguments: Sequence[str]) -> int:
    """Print what `vpns doctor` finds; the exit code is 0 where nothing is missing that vpns needs."""
    chosen = _build_parser(arguments, {}).parse_args(list(arguments))
    from vpns.doctor import examine, is_healthy, to_plain, to_text

    findings = examine()
    print(json.dumps(to_plain(findings), indent=1) if chosen.doctor.json else to_text(findings))
    return 0 if is_healthy(findings) else EXIT_ERROR


def _bench(arguments: Sequence[str]) -> int:
    """Time a network that is not a run's; print what was found, and write it where that was asked for."""
    options = parse_bench(arguments)
    from vpns.bench import bench_model, draw_report, to_text
    from vpns.files import check_writable, write_json

    try:
        if options.json is not None:
            check_writable(options.json)
        report = bench_model(options)
        print(to_text(report))
        if options.json is not None:
            write_json(options.json, report)
            draw_report(report, options.json.with_suffix(".svg"))
    except USER_ERRORS:
        if "--debug" in arguments:
            traceback.print_exc()
        raise
    return 0


def _reproduce(arguments: Sequence[str]) -> int:
    """Do a whole experiment; the exit code is 1 where runs failed."""
    options = parse_reproduce(arguments)
    from vpns.reproduce import do_reproduce

    return do_reproduce(options)


def _compare(arguments: Sequence[str]) -> int:
    """Write one report of several runs, and say where it is."""
    options = parse_comparison(arguments)
    from vpns.report.several import compare_folders

    try:
        print(compare_folders(options.folders, options.output))
    except USER_ERRORS:
        if options.is_debug:
            traceback.print_exc()
        raise
    return 0


def _sweep(arguments: Sequence[str]) -> int:
    """Do many runs; the exit code is 1 where some of them failed."""
    options = parse_sweep(arguments)
    from vpns.sweep import read_grid
    from vpns.sweep.command import do_sweep

    return do_sweep(read_grid(options.grid), options, f"vpns sweep {options.grid} --folder {options.folder}")


def _find_folder(chosen: Namespace) -> Path:
    if chosen.folder is None and chosen.run_folder is None and chosen.preset is not None:
        return Path("runs", str(chosen.preset))
    if (chosen.folder is None) == (chosen.run_folder is None):
        given = "none" if chosen.folder is None else f"{chosen.folder} and {chosen.run_folder}"
        raise ValueError(f"expected one run folder, got {given} (such as: vpns run runs/demo)")
    return Path(chosen.folder or chosen.run_folder)


def _complain(error: Exception) -> int:
    print(f"vpns: error: {describe_error(error)}", file=sys.stderr)
    return EXIT_ERROR
