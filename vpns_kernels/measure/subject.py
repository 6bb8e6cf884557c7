"""What is given to every engine? One network, one input, and what is made of them but once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vpns_kernels.onnx_file import to_onnx

Call = Callable[[], Tensor]
# By the type an engine computes in: an output further from torch's float32 than this share of the largest
# is no rounding.
_LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.3}


@dataclass(frozen=True)
class Opponent:
    """A dense engine that holds one network and one input; either `call` or `why_not` is None."""

    name: str
    call: Call | None
    why_not: str | None = None


def cast_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode, of that type, channels_last."""
    cast = copy.deepcopy(network).eval().to(dtype)
    # Not module.to(memory_format): a Conv3d or a 4-D buffer of its own meaning would change too.
    for module in cast.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return cast


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a network so cast is given."""
    given = x.detach().to(dtype)
    return given.contiguous(memory_format=torch.channels_last) if given.dim() == 4 else given


def without_grad(network: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """The network at work on x, as inference calls it."""

    def call() -> Tensor:
        with torch.no_grad():
            return network(x)

    return call


class Subject:
    """A network in evaluation mode, copied, and its input in float32, for engines to take over."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.network = copy.deepcopy(network).eval()
        self.x = x.detach()

    @cached_property
    def onnx(self) -> bytes:
        """The network as an ONNX model of float32; NotImplementedError says why there is none."""
        return to_onnx(copy.deepcopy(self.network).float(), self.x.float().contiguous())

    @cached_property
    def expected(self) -> Tensor:
        """The outputs of torch's float32."""
        with torch.no_grad():
            y: Tensor = copy.deepcopy(self.network).float()(self.x.float())
        return y

    def check(self, opponent: Opponent) -> Opponent:
        """The engine, called once; one whose outputs are wrong becomes one that cannot run."""
        if opponent.call is None:
            return opponent
        bound = _LARGEST_ERROR[opponent.name.split()[-1]]
        error = float((opponent.call().float() - self.expected).abs().max())
        # A pruned layer may have nothing but zeros to give.
        largest = float(self.expected.abs().max())
        if error <= bound * largest:
            return opponent
        why_not = (
            f"its outputs are off by {error:.2g}, the largest is {largest:.2g}: "
            f"more than the {bound:g} of rounding"
        )
        return Opponent(opponent.name, None, why_not)
