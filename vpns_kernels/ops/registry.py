"""Which ops are there, and which backend of an op runs a call?

An op's folder holds its door (`__init__.py`), its truth (`reference.py`), its inputs (`cases.py`) and one
file per backend; registering the op here is what makes the contract suite, the benches and `explain` see
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from vpns_kernels.ops.case import Case
from vpns_kernels.schemas import LIBRARY


@dataclass(frozen=True)
class Op:
    """One op: its name and its backends, in the order in which `auto` prefers them.

    A backend is the module `vpns_kernels.ops.<op>.<backend>` with `run(*args)`, taking the schema's
    arguments without `backend`, and `why_not(*args) -> str | None`, the reason why it cannot take them.
    Where the three passes of a differentiable op may have different backends, `why_no_input_gradient` and
    `why_no_weight_gradient` tell what else it cannot do.
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
            NotImplementedError: the backend asked for cannot run them; says why and which can. Or a
                derivative in forward mode was asked for, which would silently be zero.
        """
        _refuse_forward_mode(self.name, args)
        return self._resolve(backend, "why_not", args)

    def resolve_passes(
        self, backend: str | Sequence[str], *args: Any, wants: Sequence[bool] = (True, True, True)
    ) -> list[str]:
        """The backends of forward, input gradient and weight gradient: each as `resolve` finds it.

        Args:
            backend: one name for all passes, or three.
            wants: which passes will run; a name given for another one is not asked whether it can.

        Raises:
            ValueError: an unknown name, or a number of names other than one and three.
            NotImplementedError: a backend asked for cannot run its pass; says why and which can.
        """
        _refuse_forward_mode(self.name, args)
        names = [backend] * len(_PASSES) if isinstance(backend, str) else list(backend)
        if len(names) != len(_PASSES):
            raise ValueError(
                f"{self.name}: expected one backend, or three (forward, input gradient, weight gradient), "
                f"got {names}"
            )
        for name, wanted in zip(names, wants, strict=True):
            if not wanted and name != "auto":
                self.module(name)
        return [
            self._resolve(name, question, args) if wanted or name == "auto" else name
            for name, question, wanted in zip(names, _PASSES, wants, strict=True)
        ]

    def _resolve(self, backend: str, question: str, args: Sequence[Any]) -> str:
        if backend == "auto":
            return next(name for name in self.backends if self._reason(name, question, args) is None)
        reason = self._reason(backend, question, args)
        if reason is not None:
            able = [name for name in self.backends if self._reason(name, question, args) is None]
            raise NotImplementedError(
                f"{self.name}: backend {backend!r} cannot run this: {reason} (can: {able})"
            )
        return backend

    def _reason(self, backend: str, question: str, args: Sequence[Any]) -> str | None:
        """What keeps a backend from a pass: what keeps it from the op, or an answer of its own."""
        module = self.module(backend)
        reason: str | None = module.why_not(*args)
        if reason is None and hasattr(module, question):
            reason = getattr(module, question)(*args)
        return reason


# What a backend is asked about each pass.
_PASSES = ("why_not", "why_no_input_gradient", "why_no_weight_gradient")


OPS: dict[str, Op] = {}


def register_op(name: str, backends: Mapping[str, Any]) -> Op:
    """Add an op to the registry and route its torch.library schema to its backends."""
    op = OPS[name] = Op(name, backends)

    def dispatch(*args: Any) -> Any:
        *inputs, backend = args
        run = op.module(backend if isinstance(backend, str) else backend[0]).run
        kind = (inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]).device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return run(*inputs)
        # The dtypes are what the caller wants: the door has asked autocast for its own.
        with torch.autocast(kind, enabled=False):
            return run(*inputs)

    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    return op


def check_floating(op: str, **tensors: Tensor) -> None:
    """TypeError where one of these arguments is not of a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: expected {name} of a floating dtype, got {tensor.dtype}")


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over images and pixels of an output's gradient [N, K, P, Q], rounded once."""
    return grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, dtype)).to(dtype)


def _refuse_forward_mode(op: str, args: Sequence[Any]) -> None:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(
            f"{op}: expected derivatives in reverse mode, got a request for forward mode"
        )


def call(name: str) -> Callable[..., Any]:
    """The torch.library op of that name."""
    return getattr(torch.ops.vpns, name)  # type: ignore[no-any-return]
