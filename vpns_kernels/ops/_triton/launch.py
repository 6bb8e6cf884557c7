"""How is a kernel started? Through one door, where a compiler may stand instead of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of the rows that a descriptor loads.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Launch:
    """One start of one kernel.

    Args:
        kernel: a function under triton.jit.
        grid: programs along up to three axes.
        args: by name; tensors, descriptors and ints, in the order of the kernel's parameters.
        constants: its tl.constexpr parameters.
        warps: of each program.
        stages: loads that are under way while one is computed with.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Start it on the device of its tensors, or hand it to who records."""
        if 0 in self.grid:
            return
        if _recorders:
            _recorders[-1].take(self)
            return
        of_data = (arg for arg in self.args.values() if isinstance(arg, Tensor | TensorDescriptor))
        device = _device(next(of_data))
        if device.type == "cpu":
            self._start()
        else:
            with torch.cuda.device(device):
                self._start()

    def _start(self) -> None:
        arguments = {**self.args, **self.constants}
        self.kernel[self.grid](**arguments, num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class _Recorder:
    take: Callable[[Launch], None]
    capability: int


_recorders: list[_Recorder] = []


@contextmanager
def recorded(take: Callable[[Launch], None], capability: int = 9) -> Iterator[None]:
    """Inside, launches are handed to `take` and not started: for compilation without a GPU.

    Args:
        capability: major number of the compute capability of the GPU that is not there.
    """
    _recorders.append(_Recorder(take, capability))
    try:
        yield
    finally:
        _recorders.pop()


def capability_of(device: torch.device) -> int:
    """Major number of a device's compute capability; Hopper's 9 in the interpreter, which has no limits."""
    if _recorders:
        return _recorders[-1].capability
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def product_capability(device: torch.device, dtype: torch.dtype) -> int:
    """The capability for products: 8 at most for full float32 products, which no tensor core takes."""
    found = capability_of(device)
    return min(found, 8) if dtype == torch.float32 and dot_precision(dtype) == "ieee" else found


def is_aligned(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes, as a view may not."""
    return tensor.data_ptr() % ALIGNMENT_BYTES == 0


def aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy that begins where a descriptor may."""
    return tensor if is_aligned(tensor) else tensor.clone()


def describe(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A tensor whose boxes of `block` entries kernels load by coordinates; beyond its edges it is zero.

    Its last axis is dense; the strides of the others are multiples of 16 bytes.
    """
    # Of an axis of one entry the stride is anybody's, yet a descriptor wants one that it could take.
    legal = ALIGNMENT_BYTES // tensor.element_size()
    steps = [step if size > 1 else legal for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*steps[:-1], 1], list(block))


def dot_precision(dtype: torch.dtype) -> str:
    """How products of this type are taken: float32 as TF32 only where torch's convolutions may."""
    # Not allow_tf32, which cannot be read where convolutions and recurrent layers were told differently.
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and precision == "tf32" else "ieee"


def _device(argument: Tensor | TensorDescriptor) -> torch.device:
    return (argument.base if isinstance(argument, TensorDescriptor) else argument).device
