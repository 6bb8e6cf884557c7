"""Which runs does a grid ask for? Every combination of its axes, each with a name and its whole settings.

settings:                       # of every run; what is left out has its default
  search: {epochs: 20}
grid:
  method: [vpns, hydra]         # a setting and its values
  density: [0.1, 0.05]
  seed: [7, 9]
  data:                         # a section, and named settings of it
    digits: {name: digits}
    mine: {name: folder, root: photos}
  arm:                          # a name of your own, and named settings of the whole run
    framed: {prompt.frame: 2}
    plain: {method: hydra, prompt.kind: none}
until: report                   # or eval, which leaves out packing, timing and the single reports
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vpns.config import RunConfig, flatten

UNTIL = ("eval", "report")
_KEYS = ("settings", "grid", "until")
_SECTIONS = tuple(
    field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)
)
# Sections whose plain value is a name: data: [digits] is data.name: [digits].
_NAMED = ("data", "model")
_SETTINGS = tuple(flatten(RunConfig().to_dict()))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid.

    Args:
        name: of its folder; made of its choices.
        choices: what it takes of each axis, by the axis's name.
    """

    name: str
    choices: dict[str, str]
    config: RunConfig


@dataclass(frozen=True)
class Grid:
    """The runs, in the order of the grid, and the stage they go on to."""

    runs: tuple[PlannedRun, ...]
    until: str = "report"


def read_grid(path: Path) -> Grid:
    """The grid that a YAML file describes.

    Raises:
        ValueError: naming the file, and what in it is not a grid or not a setting.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"read_grid: expected YAML in {path}, got {error}") from error
    try:
        return build_grid(content)
    except (ValueError, TypeError, ArgumentError) as error:
        raise ValueError(f"{path}: {error}") from error


def build_grid(content: object) -> Grid:
    """The grid that plain values describe; see the head of this file."""
    if not isinstance(content, Mapping) or not isinstance(content.get("grid"), Mapping):
        raise ValueError(f"build_grid: expected keys in {list(_KEYS)}, grid among them, got {content!r}")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(f"build_grid: expected keys in {list(_KEYS)}, got {unknown}")
    until = content.get("until", "report")
    if until not in UNTIL:
        raise ValueError(f"build_grid: expected until in {list(UNTIL)}, got {until!r}")
    base = _flat_settings(content.get("settings") or {}, "", "settings")
    axes = {str(name): _read_axis(str(name), values) for name, values in content["grid"].items()}
    runs = tuple(_combine(base, axes))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"build_grid: expected runs of different names, got {twice[0]} twice")
    return Grid(runs, until)


def _read_axis(name: str, values: object) -> dict[str, dict[str, Any]]:
    """The settings of each choice of an axis, by the choice's label."""
    if isinstance(values, Mapping) and values:
        prefix = f"{name}." if name in _SECTIONS else ""
        return {str(label): _flat_settings(of, prefix, f"{name}.{label}") for label, of in values.items()}
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(
            f"build_grid: expected a list of values, or named settings, for {name!r}, got {values!r}"
        )
    setting = f"{name}.name" if name in _NAMED else name
    if setting not in _SETTINGS:
        raise ValueError(f"build_grid: expected a setting, got {name!r}{_suggest(setting)}")
    labels = [value if isinstance(value, str) else f"{value!r}" for value in values]
    if len(set(labels)) < len(labels):
        raise ValueError(f"build_grid: expected different values for {name!r}, got {values!r}")
    return {label: {setting: value} for label, value in zip(labels, values, strict=True)}


def _flat_settings(values: object, prefix: str, where: str) -> dict[str, Any]:
    """Settings by dotted name, be they nested or dotted already."""
    if not isinstance(values, Mapping):
        raise ValueError(f"build_grid: expected settings for {where}, got {values!r}")
    flat = {f"{prefix}{key}": value for key, value in flatten(dict(values)).items()}
    for name in flat:
        if name not in _SETTINGS:
            raise ValueError(f"build_grid: expected settings for {where}, got {name!r}{_suggest(name)}")
    return flat


def _suggest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, _SETTINGS, n=1)
    return f" (did you mean {near[0]}?)" if near else " (vpns run --print_config shows every setting)"


def _combine(base: Mapping[str, Any], axes: Mapping[str, Mapping[str, Any]]) -> Iterator[PlannedRun]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, nested_key=None)
    for labels in itertools.product(*axes.values()):
        choices = dict(zip(axes, labels, strict=True))
        settings = dict(base)
        for axis, label in choices.items():
            settings |= axes[axis][label]
        name = "-".join(_slug(axis, label) for axis, label in choices.items()) or "run"
        try:
            config = RunConfig.from_dict(parser.parse_object(settings).as_dict())
        except (ArgumentError, ValueError, TypeError) as error:
            raise ValueError(f"run {name}: {' '.join(str(error).split())}") from error
        yield PlannedRun(name, choices, config)


def _slug(axis: str, label: str) -> str:
    """A part of a folder's name; a bare number or truth value has the name of its setting before it."""
    word = re.sub(r"[^A-Za-z0-9.]+", "_", label).strip("_.") or "_"
    is_word = label[:1].isalpha() and label not in ("None", "True", "False")
    return word if is_word else f"{re.sub(r'[^A-Za-z0-9.]+', '_', axis)}{word}"
