"""What does the command `vpns` do? One sub-command per stage: it does what is missing up to that stage."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence

from jsonargparse import ArgumentError

from vpns.bench_options import find_bench, parse_bench
from vpns.complaint import EXIT_INTERRUPTED, describe_error, is_user_error
from vpns.data_command import parse_data, run_data
from vpns.report_options import find_comparison, parse_comparison
from vpns.reproduce_options import parse_reproduce
from vpns.stage_options import COMMANDS, Asked, build_parser, expect_run, parse
from vpns.sweep_options import parse_sweep

__all__ = ["COMMANDS", "EXIT_ERROR", "EXIT_INTERRUPTED", "Asked", "main", "parse"]

EXIT_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 where runs of many failed, 2 after an error, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Of every command, and wherever it stands: taken here, so that it also shows where parsing fails.
    words = [word for word in given if word != "--debug"]
    is_debug = len(words) < len(given)
    try:
        return _do(words)
    except Exception as error:
        if not isinstance(error, ArgumentError) and not is_user_error(error):
            raise
        if is_debug:
            traceback.print_exc()
        # What is wrong with a command line is seen without.
        hint = "" if is_debug or isinstance(error, ArgumentError) else " (--debug shows where)"
        print(f"vpns: error: {describe_error(error)}{hint}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("vpns: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _do(words: Sequence[str]) -> int:
    if not words:
        print(build_parser().format_help(), file=sys.stderr)
        return EXIT_ERROR
    own = {"data": _data, "doctor": _examine, "reproduce": _reproduce, "sweep": _sweep}
    if words[0] in own:
        return own[words[0]](words[1:])
    if (options := find_comparison(words)) is not None:
        return _compare(options)
    if (options := find_bench(words)) is not None:
        return _bench(options)
    asked = parse(words)
    expect_run(asked, words)
    return _run(asked)


def _run(asked: Asked) -> int:
    """Do what is missing of a run, up to a stage."""
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
    except KeyboardInterrupt:
        print(f"vpns: interrupted; `vpns {asked.command} {asked.folder}` goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _data(options: Sequence[str]) -> int:
    """Check or fetch data; the exit code is 0 where nothing is missing."""
    return 0 if run_data(parse_data(options)) else EXIT_ERROR


def _examine(options: Sequence[str]) -> int:
    """Print what `vpns doctor` finds; the exit code is 0 where nothing is missing that vpns needs."""
    chosen = build_parser().parse_args(["doctor", *options])
    from vpns.doctor import examine, is_healthy, to_plain, to_text

    findings = examine()
    print(json.dumps(to_plain(findings), indent=1) if chosen.doctor.json else to_text(findings))
    return 0 if is_healthy(findings) else EXIT_ERROR


def _bench(arguments: Sequence[str]) -> int:
    """Time a network that is not a run's; print what was found, and write it where that was asked for."""
    options = parse_bench(arguments)
    from vpns.bench import bench_model, draw_report, to_text
    from vpns.files import check_writable, write_json

    if options.json is not None:
        check_writable(options.json)
    report = bench_model(options)
    print(to_text(report, options.shows_goals))
    if options.json is not None:
        write_json(options.json, report)
        draw_report(report, options.json.with_suffix(".svg"))
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

    print(compare_folders(options.folders, options.output))
    return 0


def _sweep(arguments: Sequence[str]) -> int:
    """Do many runs; the exit code is 1 where some of them failed."""
    options = parse_sweep(arguments)
    from vpns.sweep import read_grid
    from vpns.sweep.command import do_sweep

    return do_sweep(read_grid(options.grid), options, f"vpns sweep {options.grid} --folder {options.folder}")
