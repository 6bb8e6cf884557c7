"""Against what is it measured? Dense engines, each ready to call or with the reason why it is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from vpns_kernels.measure.onnx_engines import deepsparse, onnxruntime, openvino
from vpns_kernels.measure.subject import Opponent, Subject, cast_input, cast_network, without_grad


def find_opponents(network: nn.Module, x: Tensor, names: Iterable[str] | None = None) -> dict[str, Opponent]:
    """Dense engines for a network (or one layer) and its input, by name, in the order of the names.

    Each was called once, and gave the outputs of torch's float32 but for the rounding of its own type.

    Args:
        network: in any mode; it is copied, the copy put in eval mode, channels_last and the engine's dtype.
        x: [N, C, H, W] or [N, C].
        names: of OPPONENTS; all of them by default. The compiled ones take seconds to minutes to get ready.

    Raises:
        ValueError: a name that no engine has.
    """
    wanted = tuple(OPPONENTS if names is None else names)
    if unknown := [name for name in wanted if name not in OPPONENTS]:
        raise ValueError(f"find_opponents: expected names of {list(OPPONENTS)}, got {unknown}")
    subject = Subject(network, x)
    return {name: subject.check(OPPONENTS[name](name, subject)) for name in wanted}


def _eager(name: str, subject: Subject) -> Opponent:
    dtype = _dtype(name)
    return Opponent(name, without_grad(cast_network(subject.network, dtype), cast_input(subject.x, dtype)))


def _compiled(name: str, subject: Subject) -> Opponent:
    dtype = _dtype(name)
    # Frozen weights are laid out and folded once: the fastest that the compiler offers for inference.
    compiled = torch.compile(cast_network(subject.network, dtype), options={"freezing": True})
    call = without_grad(compiled, cast_input(subject.x, dtype))
    try:
        call()
    except RuntimeError as error:
        # The compiler's own errors derive from it: no C++ compiler, an op that it cannot lower.
        return Opponent(name, None, f"torch.compile stopped: {' '.join(str(error).split())[:200]}")
    return Opponent(name, call)


OPPONENTS: dict[str, Callable[[str, Subject], Opponent]] = {
    "torch float32": _eager,
    "torch bfloat16": _eager,
    "torch.compile float32": _compiled,
    "torch.compile bfloat16": _compiled,
    "onnxruntime float32": onnxruntime,
    "openvino float32": openvino,
    "openvino bfloat16": openvino,
    "openvino int8": openvino,
    "deepsparse float32": deepsparse,
}


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name.split()[-1]]


def find_sparseprop(conv: nn.Module, x: Tensor) -> nn.Module | None:
    """SparseProp's form of a pruned convolution, the faster of its two; None where not installed.

    It takes float32 in [N, C, H, W] order, square filters, one stride and padding, no groups.
    """
    if find_spec("sparseprop") is None or not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return None
    module = import_module("sparseprop.modules").SparseConv2d
    forms: list[nn.Module] = [module.from_dense(conv, vectorizing_over_on=over) for over in (False, True)]

    def seconds(form: nn.Module) -> float:
        form(x)
        started = time.perf_counter()
        form(x)
        return time.perf_counter() - started

    with torch.no_grad():
        return min(forms, key=seconds)
