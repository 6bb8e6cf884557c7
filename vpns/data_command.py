"""What does `vpns data` do? It checks a folder of data, or downloads a published set into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from vpns.option_help import add_debug


@dataclass(frozen=True)
class DataOptions:
    """What a command line asks for.

    Args:
        task: check or download.
        name: of the data set; None to look for all.
        is_quick: whether to leave the images undecoded.
    """

    task: str
    folder: Path
    name: str | None
    is_quick: bool = False


def parse_data(arguments: Sequence[str]) -> DataOptions:
    """What `vpns data ...` says; ArgumentError where it is wrong."""
    parser = ArgumentParser(
        prog="vpns data",
        description="Look at a folder of images, or fetch a published data set into it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    tasks = parser.add_subcommands(dest="task")
    check = ArgumentParser(exit_on_error=False)
    add_debug(check)
    check.add_argument("folder", type=str, help="data.root of a run")
    check.add_argument("--name", type=str, help="of the data set (default: all that are found)")
    check.add_argument("--quick", action="store_true", help="do not decode the images")
    tasks.add_subcommand(
        "check", check, help="say what is there and what is missing; exit code 2 if anything is"
    )
    download = ArgumentParser(exit_on_error=False)
    add_debug(download)
    download.add_argument("name", type=str, help="of the data set")
    download.add_argument("folder", type=str, help="data.root of a run; made if it is missing")
    tasks.add_subcommand("download", download, help="fetch a data set from where its authors offer it")
    chosen = parser.parse_args(list(arguments))
    asked = chosen[chosen.task]
    return DataOptions(chosen.task, Path(asked.folder), asked.name, asked.get("quick", False))


def run_data(options: DataOptions) -> bool:
    """Do it, and print what was found; False where anything is missing."""
    # Importing torch takes a second, which --help and a mistyped option should not.
    from vpns.data.check import check_data, to_text
    from vpns.data.download import download_data

    if options.task == "download":
        assert options.name is not None
        download_data(options.name, options.folder)
    found = check_data(options.folder, options.name, decodes=not options.is_quick)
    print(to_text(found))
    return not any(one.problems for one in found)
