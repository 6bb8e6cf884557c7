"""What does SparseProp take for the two gradients that ours take a pass each for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.opponents import find_sparseprop
from vpns_kernels.measure.timing import Laps, Sample, add_up, compare


def sparseprop_passes(layer: Layer, masked: Tensor, x: Tensor, grad: Tensor) -> Callable[[Laps], None] | None:
    """Forward, and the one backward pass that gives both gradients; None where it is not installed.

    Args:
        masked: the weight, zeros where pruned; float32, as x and grad are.
    """
    if layer.is_linear:
        return None
    conv = layer.build()
    conv.weight = torch.nn.Parameter(masked.contiguous())
    # It knows no channels_last.
    given, back = x.contiguous().requires_grad_(True), grad.contiguous()
    rival = find_sparseprop(conv, given)
    if rival is None:
        return None

    def run(laps: Laps) -> None:
        laps.skip()
        y = rival(given)
        laps.mark("forward")
        torch.autograd.grad(y, (given, rival.weight), back)
        laps.mark("backward")

    return run


def over_sparseprop(theirs: Mapping[str, Sample] | None, ours: Mapping[str, Sample]) -> dict[str, Any] | None:
    """Its times, and how many times as fast ours are: both gradients together, as its pass has them."""
    if theirs is None:
        return None
    both = add_up({name: ours[name] for name in ("input_gradient", "weight_gradient")})
    return {
        "forward_ms": theirs["forward"].median_ms,
        "backward_ms": theirs["backward"].median_ms,
        "forward": asdict(compare(theirs["forward"], ours["forward"])),
        "backward": asdict(compare(theirs["backward"], both)),
    }
