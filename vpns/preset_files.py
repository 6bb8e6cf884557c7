"""Which settings come with the package? Those of the paper's data sets and networks, one YAML file each."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

_FOLDER = Path(__file__).parent / "presets"


def list_presets() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_preset(name: str) -> Path:
    """The file of a preset.

    Raises:
        ValueError: a name that is none, with those that are near.
    """
    names = list_presets()
    if name not in names:
        near = get_close_matches(name, names, 2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"--preset: expected one of {', '.join(names)}, got {name!r}{hint}")
    return _FOLDER / f"{name}.yaml"
