"""How is work on a GPU recorded and played again? As CUDA graphs, one for each batch size.

A graph reads and writes where it was recorded: images are copied in, results out. All of them run on one
stream of their own, one after the other, whoever calls: so they may share what lies between.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
# Kernels are compiled, chosen and given their memory by the first calls.
_WARM_UP = 3
# Graphs that are kept: each holds the activations of its batch size.
LIMIT = 8
# What torch says of each wait, where it is asked to.
_WAIT = ".*synchronizing CUDA operation"
# Torch records one graph at a time in a process.
_recording = Lock()


class Recorder(Protocol):
    """What records work; a test's may do so without a GPU."""

    def record(self, work: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        """What the work returned, and what does it again, with the same tensors."""

    def turn(self) -> AbstractContextManager[None]:
        """Inside, work comes after the caller's own so far, and before what the caller does next."""

    def hand_over(self, tensor: Tensor) -> Tensor:
        """A tensor that was made inside a turn, for the caller's stream."""


class CudaRecorder:
    """CUDA graphs of one device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._caller = torch.cuda.current_stream(device)
        self._pool: Any = None

    def record(self, work: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        """Record work as a graph (see Recorder) after some runs; RuntimeError if it waits for the host."""
        with _recording:
            return self._record(work)

    def _record(self, work: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP - 1):
                work()
            # A recording that fails leaves torch's allocator waiting for its end: better not begun.
            if waits := _find_waits(work):
                raise RuntimeError(f"expected work that can be recorded, got: {waits[0]}")
            self._stream.synchronize()
            # Other threads may go on with what they do on the device.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                result = work()
        self._pool = graph.pool()
        return result, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work inside comes between the caller's work before and after it (see Recorder)."""
        caller = self._caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """Let the caller's stream keep a tensor that was made inside a turn (see Recorder)."""
        tensor.record_stream(self._caller)
        return tensor


def _find_waits(work: Callable[[], object]) -> list[str]:
    """What torch says of this thread's waits for a GPU, while it works.

    Torch warns whoever waits, in any thread, and would stop them all if asked to stop us.
    """
    found: list[str] = []
    thread, before = get_ident(), torch.cuda.get_sync_debug_mode()

    def note(message: Warning | str, *rest: object, **more: object) -> None:
        if get_ident() == thread:
            found.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", _WAIT)
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


@dataclass(frozen=True, eq=False)
class _Recording:
    x: Tensor
    y: Tensor
    replay: Callable[[], None]


class GraphRunner:
    """Runs a function of images [N, ...], recorded at the first call with each N.

    Args:
        function: gives a tensor for images of one size and dtype, and always does the same.
        like: images, of whose dtype, device and size (but N) the recorded ones are.
        limit: the least recently used recording goes where there would be more.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], like: Tensor, recorder: Recorder, limit: int = LIMIT
    ) -> None:
        if limit < 1:
            raise ValueError(f"GraphRunner: expected a limit of at least 1, got {limit}")
        self._function, self._like, self._recorder, self._limit = function, like, recorder, limit
        self._recordings: OrderedDict[int, _Recording] = OrderedDict()
        self._lock = Lock()

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes that are recorded, the least recently used first."""
        return list(self._recordings)

    def __call__(self, x: Tensor) -> Tensor:
        """What the function gives for x, in memory of its own."""
        with self._lock, self._recorder.turn():
            recording = self._find(x)
            recording.x.copy_(x)
            recording.replay()
            return self._recorder.hand_over(recording.y.clone())

    def _find(self, x: Tensor) -> _Recording:
        found = self._recordings.get(len(x))
        if found is None:
            while len(self._recordings) >= self._limit:
                self._recordings.popitem(last=False)
            # What is made in inference mode could not be written outside it.
            with torch.inference_mode(False), torch.no_grad():
                found = self._recordings[len(x)] = self._record(x)
        self._recordings.move_to_end(len(x))
        return found

    def _record(self, x: Tensor) -> _Recording:
        images = torch.empty(
            (len(x), *self._like.shape[1:]),
            dtype=self._like.dtype,
            device=self._like.device,
            memory_format=torch.channels_last if self._like.dim() == 4 else torch.contiguous_format,
        )
        # Not what memory happened to hold: the first calls run with it.
        images.copy_(x)
        y, replay = self._recorder.record(lambda: self._function(images))
        return _Recording(images, y, replay)
