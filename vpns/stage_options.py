"""What can the command of a stage be told? Settings, where it may begin a run; else the run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vpns.config import RunConfig, flatten
from vpns.option_help import add_debug, describe_options
from vpns.preset_files import find_preset, list_presets

Format = Literal["artifact", "onnx", "torch"]

COMMANDS = {
    "run": "every stage, from a network to a report",
    "pretrain": "teach the network letters, or take the weights it is given",
    "dense": "fine-tune the dense reference",
    "search": "find mask and prompt",
    "tune": "train what the mask keeps",
    "eval": "test, once",
    "export": "write the artifact",
    "bench": "time sparse against dense: a run, an artifact, or any network by its name",
    "report": "write report.html and report.json of a run, or a comparison of several",
}
# These take a run as it is, with its own settings.
_READING = ("export", "bench", "report")
# These look at what a run has made, and start none.
_LAST = ("eval", *_READING)


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Args:
        checks: whether search and tune compare their kernels with the dense reference before they train.
        format: what `export` writes beside the artifact.
        downloads: whether to fetch the data set first, where it is not there.
        is_dry: whether to say what would be done, and do nothing.
    """

    folder: Path
    command: str
    config: RunConfig
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
    if command in _READING:
        config = _load_config(folder) or RunConfig()
        return Asked(folder, command, config, format=chosen.get("format", "artifact"), is_dry=chosen.dry_run)
    if chosen.config is None and (begun := _load_config(folder)) is not None:
        command, chosen = _parse_with(flatten(begun.to_dict()), arguments)
    values = chosen.as_dict()
    config = RunConfig.from_dict({field.name: values[field.name] for field in dataclasses.fields(RunConfig)})
    return Asked(
        folder,
        command,
        config,
        checks=chosen.check,
        downloads=chosen.download,
        is_dry=chosen.dry_run,
    )


def expect_run(asked: Asked, arguments: Sequence[str]) -> None:
    """Refuse to start a run, of no settings, where a command looks at what one has made."""
    if asked.command not in _LAST or (asked.folder / "run.json").exists():
        return
    names = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    if asked.command not in _READING and not names <= {"--check", "--dry-run", "--run-folder"}:
        return
    found = "which holds no run.json" if asked.folder.exists() else "which is not there"
    hint = "vpns run FOLDER makes a run"
    if asked.command == "bench":
        hint = "it may also be an artifact's; --model NAME times any network"
    raise ValueError(f"{asked.command}: expected the folder of a run, got {asked.folder}, {found} ({hint})")


def _load_config(folder: Path) -> RunConfig | None:
    """The settings that a folder was begun with; None where it was not."""
    if not (folder / "run.json").exists():
        return None
    from vpns.run import load_config

    return load_config(folder)


def _parse_with(defaults: dict[str, Any], arguments: Sequence[str]) -> tuple[str, Namespace]:
    ahead, others = _split_config(arguments)
    # --config ahead, so that an option overrides the file wherever it stands.
    ordered = others[:1] + ahead + others[1:]
    try:
        namespace = build_parser(arguments, defaults).parse_args(ordered)
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


def build_parser(arguments: Sequence[str] = (), defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """Every sub-command; only those among the arguments get their settings, which take long to add."""
    parser = ArgumentParser(
        prog="vpns",
        description="Prune a vision network with a visual prompt, and measure what that gains.",
        exit_on_error=False,
        allow_abbrev=False,
        version=_version(),
    )
    commands = parser.add_subcommands(dest="command")
    for name, help_text in COMMANDS.items():
        command = _reading_parser(name) if name in _READING else _training_parser()
        if name in arguments and name not in _READING:
            command.add_class_arguments(RunConfig, nested_key=None)
            describe_options(command, RunConfig)
            command.set_defaults(defaults or {})
        commands.add_subcommand(name, command, help=help_text)
    # Those below are listed here, and parsed by modules of their own.
    for name, help_text in {
        "data": "check a folder of images, or download a published data set",
        "reproduce": "a whole experiment: arms, exp1, exp2 or exp3",
        "sweep": "many runs: every combination of a grid of settings",
    }.items():
        commands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=help_text)
    doctor = ArgumentParser(exit_on_error=False)
    doctor.add_argument("--json", action="store_true", help="for programs")
    add_debug(doctor)
    commands.add_subcommand("doctor", doctor, help="say what this machine can run and what to expect of it")
    return parser


def _training_parser() -> ArgumentParser:
    """Of a command that may begin a run: with every setting, which come last."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; options override it")
    _add_folder(parser, "run folder; made if it is missing")
    check = "before search and tune train, compare 20 iterations with the dense reference"
    parser.add_argument("--check", action="store_true", help=check)
    fetch = "fetch data.name into data.root first, where it is not there"
    parser.add_argument("--download", action="store_true", help=fetch)
    parser.add_argument("--preset", type=str, help=f"settings of the paper: {', '.join(list_presets())}")
    return parser


def _reading_parser(name: str) -> ArgumentParser:
    """Of a command that takes a run as it is."""
    parser = ArgumentParser(exit_on_error=False)
    _add_folder(parser, "run folder")
    if name == "export":
        told = "also as ONNX, or as torch's state_dict"
        parser.add_argument("--format", type=Format, default="artifact", help=told)
    return parser


def _add_folder(parser: ArgumentParser, told: str) -> None:
    parser.add_argument("folder", nargs="?", help=told)
    parser.add_argument("--run-folder", "--run_folder", dest="run_folder", help="the same, as an option")
    dry = "say what would be done: settings, data, time and memory; do nothing"
    parser.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true", help=dry)
    add_debug(parser)


def _find_folder(chosen: Namespace) -> Path:
    preset = chosen.get("preset")
    if chosen.folder is None and chosen.run_folder is None and preset is not None:
        return Path("runs", str(preset))
    if (chosen.folder is None) == (chosen.run_folder is None):
        given = "none" if chosen.folder is None else f"{chosen.folder} and {chosen.run_folder}"
        raise ValueError(f"expected one run folder, got {given} (such as: vpns run runs/demo)")
    return Path(chosen.folder or chosen.run_folder)


def _version() -> str:
    try:
        return version("vpns")
    except PackageNotFoundError:
        return "of a source tree that is not installed"
