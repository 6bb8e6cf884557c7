"""What does each option mean? Its words in the docstring of the class of settings it belongs to."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence

from jsonargparse import ArgumentParser

# "Args:" to the next section; an entry is "name: words", or "one, other: words", with further lines.
_SECTION = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*?)(?=^ {4}\S|\Z)", re.MULTILINE | re.DOTALL)


def add_debug(parser: ArgumentParser) -> None:
    """For the help of every command: `main` takes it out before any parser sees it."""
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def asks_help(options: Sequence[str]) -> bool:
    """Whether a command line asks what it may be."""
    return "--help" in options or "-h" in options


def describe_options(parser: ArgumentParser, settings: type) -> None:
    """Give the options of a dataclass, and of those within it, their help and their headings.

    Args:
        parser: one that has the class's arguments at its top level.
    """
    texts, headings = option_texts(settings), _headings(settings)
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest]
    for group in parser._action_groups:
        group.title = headings.get(group.title or "", group.title)


def option_texts(settings: type, prefix: str = "") -> dict[str, str]:
    """Dotted names of all settings with their words."""
    own = _documented(settings)
    texts: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        if field.name in own:
            texts[prefix + field.name] = own[field.name]
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            texts[prefix + field.name] = "YAML file of these settings"
            texts |= option_texts(field.type, f"{prefix}{field.name}.")
    return texts


def _documented(settings: type) -> dict[str, str]:
    """Fields and their words in a class's docstring, or in those it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        section = _SECTION.search(inspect.cleandoc(kind.__doc__ or ""))
        for names, words in _ENTRY.findall(section.group(1) if section else ""):
            found |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return found


def _headings(settings: type) -> dict[str, str]:
    """jsonargparse's headings, and the first sentence of the class instead."""
    classes = [settings, *(field.type for field in dataclasses.fields(settings))]
    return {
        str(kind): inspect.cleandoc(kind.__doc__ or "").splitlines()[0].rstrip(".")
        for kind in classes
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
