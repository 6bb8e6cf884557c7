"""Which ops are there, and which backend of an op runs a call?

An op's folder holds its door (`__init__.py`), its truth (`reference.py`), its inputs (`cases.py`) and one
file per backend; registering the op here is what makes the contract suite, the benches and `explain` see
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from vpns_kernels.ops.case import Case
from vpns_kernels.schemas import LIBRARY


@dataclass(frozen=True)
class Op:
    """One op: its name and its backends, in the order in which `auto` prefers them.

    A backend is the module `vpns_kernels.ops.<op>.<backend>` with `run(*args)`, taking the schema's
    arguments without `backend`, and `why_not(*args) -> str | None`, the reason why it cannot take them.
    """

    name: str
    backends: Mapping[str, Any]

    def module(self, backend: str) -> Any:
        """The module of one backend; ValueError where the op has none of that name."""
        if backend not in self.backends:
            raise ValueError(f"{self.name}: expected backend in {('auto', *self.backends)}, got {backend!r}")
        return self.backends[backend]

    def cases(self) -> list[Case]:
        """The op's inputs, for suites and benches."""
        found: list[Case] = import_module(f"vpns_kernels.ops.{self.name}.cases").CASES
        return found

    def resolve(self, backend: str, *args: Any) -> str:
        """The backend that will run these arguments: the one asked for, or for "auto" the first that can.

        Raises:
            NotImplementedError: the backend asked for cannot run them; says why and which can.
        """
        if backend != "auto":
            reason = self.module(backend).why_not(*args)
            if reason is not None:
                able = [name for name in self.backends if self.module(name).why_not(*args) is None]
                raise NotImplementedError(
                    f"{self.name}: backend {backend!r} cannot run this: {reason} (can: {able})"
                )
            return backend
        return next(name for name in self.backends if self.module(name).why_not(*args) is None)


OPS: dict[str, Op] = {}


def register_op(name: str, backends: Mapping[str, Any]) -> Op:
    """Add an op to the registry and route its torch.library schema to its backends."""
    op = OPS[name] = Op(name, backends)

    def dispatch(*args: Any) -> Any:
        *inputs, backend = args
        return op.module(backend).run(*inputs)

    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    return op


def call(name: str) -> Callable[..., Any]:
    """The torch.library op of that name."""
    return getattr(torch.ops.vpns, name)  # type: ignore[no-any-return]
