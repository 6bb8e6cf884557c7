"""How long does a piece of work take on a device? Repeated in a recording, so that starts cost nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from vpns_kernels.engine.graphs import CudaRecorder

# What one recording holds, and how often it is played.
_REPEATS, _ROUNDS = 10, 5


def replayable(
    work: Callable[[], object], device: torch.device, repeats: int, is_recorded: bool = True
) -> Callable[[], None]:
    """What does the work `repeats` times and returns when it is done; on a GPU from a recording.

    Args:
        is_recorded: False for work that waits for the host, which no recording can hold.

    Raises:
        RuntimeError: on a GPU, work that waits for the host.
    """

    def repeat() -> None:
        for _ in range(repeats):
            work()

    if device.type != "cuda":
        return repeat
    replay = CudaRecorder(device).record(repeat)[1] if is_recorded else repeat

    def play() -> None:
        replay()
        torch.cuda.synchronize(device)

    return play


def measure_ms(work: Callable[[], object], device: torch.device, is_recorded: bool = True) -> float:
    """The least of some rounds, for one piece of work.

    Args:
        is_recorded: as replayable's.

    Raises:
        RuntimeError: on a GPU, work that waits for the host.
    """
    repeats = _REPEATS if device.type == "cuda" else 1
    play = replayable(work, device, repeats, is_recorded)
    play()
    least = math.inf
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        play()
        least = min(least, 1e3 * (time.perf_counter() - started) / repeats)
    return least
