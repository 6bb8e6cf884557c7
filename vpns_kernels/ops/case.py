"""What is a case? Inputs of an op with a name; suites and benches draw from the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A named input.

    Args:
        build: makes the arguments of the op's door, the same at each call.
    """

    name: str
    build: Callable[[], Any]
