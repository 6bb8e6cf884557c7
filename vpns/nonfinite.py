"""Where does a network's arithmetic stop being finite? At a tensor that it holds, or at a layer's output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vpns.batches import Batch
from vpns.predictor import Predictor


@torch.no_grad()
def locate_nonfinite(predictor: Predictor, batches: Iterable[Batch]) -> str:
    """The first tensor, or else the first output in order of execution, with a NaN or infinity; in words.

    The batches are run again, in the predictor's mode: statistics of batch norms move.
    """
    named = {_layer(name): t for name, t in (*predictor.named_parameters(), *predictor.named_buffers())}
    for name, tensor in named.items():
        if not _is_finite(tensor):
            return f"{name} is not finite"
    names = {
        module: _layer(name) for name, module in predictor.named_modules() if not list(module.children())
    }
    found: list[str] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not _is_finite(output):
            found.append(names[module])

    hooks = [module.register_forward_hook(note) for module in names]
    try:
        for batch in batches:
            predictor(batch.images, batch.prompted)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the first output that is not finite is that of {found[0]}" if found else "all layers are finite"


def _layer(name: str) -> str:
    """Without the part of the predictor that it stands in."""
    return name.partition(".")[2] or name


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
