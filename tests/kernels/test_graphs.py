"""Is each batch size recorded once, played with the images of the call, and dropped when others need room?"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from vpns_kernels.engine.gpu_clock import measure_ms, replayable
from vpns_kernels.engine.graphs import CudaRecorder, GraphRunner


class FakeRecorder:
    """Plays by calling again, into the tensor of the first call, as a graph does."""

    def __init__(self) -> None:
        self.recorded, self.played, self.handed_over = 0, 0, 0
        self.is_in_turn = False

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        assert self.is_in_turn
        self.recorded += 1
        result = work()

        def replay() -> None:
            self.played += 1
            result.copy_(work())

        return result, replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.is_in_turn
        self.is_in_turn = True
        yield
        self.is_in_turn = False

    def hand_over(self, tensor: Tensor) -> Tensor:
        assert self.is_in_turn
        self.handed_over += 1
        return tensor


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 3, 3)


def make_runner(limit: int) -> tuple[GraphRunner, FakeRecorder]:
    recorder = FakeRecorder()
    return GraphRunner(lambda x: x.sum((2, 3)) * 2, images(1), recorder, limit), recorder


def test_each_batch_size_is_recorded_once_and_played_for_every_call() -> None:
    runner, recorder = make_runner(4)
    for count in (3, 1, 3, 1, 3):
        x = images(count)
        torch.testing.assert_close(runner(x), 2 * x.sum((2, 3)))
    assert (recorder.recorded, recorder.played, recorder.handed_over) == (2, 5, 5)
    assert runner.batch_sizes == [1, 3]


def test_results_stay_what_they_were_when_the_next_call_comes() -> None:
    runner, _ = make_runner(4)
    x, other = images(2), images(2)
    first = runner(x)
    runner(other)
    torch.testing.assert_close(first, 2 * x.sum((2, 3)))


def test_the_least_recently_used_batch_size_goes_first() -> None:
    runner, recorder = make_runner(2)
    for count in (1, 2, 1, 3):
        runner(images(count))
    assert runner.batch_sizes == [1, 3]
    runner(images(2))
    assert recorder.recorded == 4
    assert runner.batch_sizes == [3, 2]


def test_images_of_another_type_and_layout_are_brought_into_the_recorded_one() -> None:
    runner, recorder = make_runner(2)
    x = images(2).double().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(runner(x), 2 * x.float().sum((2, 3)))
    assert recorder.recorded == 1


def test_a_recording_that_fails_leaves_nothing_behind() -> None:
    class Failing(FakeRecorder):
        def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            raise RuntimeError("waits for the host")

        @contextmanager
        def turn(self) -> Iterator[None]:
            yield

    runner = GraphRunner(lambda x: x, images(1), Failing())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="waits for the host"):
            runner(images(1))
    assert runner.batch_sizes == []


def test_a_batch_size_first_seen_in_inference_mode_is_taken_outside_it_too() -> None:
    runner, recorder = make_runner(2)
    x = images(2)
    with torch.inference_mode():
        torch.testing.assert_close(runner(x + 0), 2 * x.sum((2, 3)))
    torch.testing.assert_close(runner(x), 2 * x.sum((2, 3)))
    assert recorder.recorded == 1


class FakeCuda:
    """Of torch.cuda what a recording needs; its mode is what torch asks of waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode: int | str = 0
        self.captures: list[str] = []
        self.is_capturing = False
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: MagicMock())
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def set_mode(self, mode: int | str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        self.mode = mode

    def wait(self) -> None:
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    @contextmanager
    def graph(self, *args: object, **options: object) -> Iterator[None]:
        assert not self.is_capturing
        self.is_capturing = True
        self.captures.append(threading.current_thread().name)
        yield
        self.is_capturing = False


def test_work_that_waits_for_the_host_is_found_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="that can be recorded, got: called a synchronizing"):
        recorder.record(cuda.wait)
    assert (cuda.captures, cuda.mode) == ([], 0)
    calls: list[int] = []
    recorder.record(lambda: calls.append(1))
    assert (len(calls), len(cuda.captures), cuda.mode) == (4, 1, 0)


def test_other_threads_may_wait_while_work_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def work() -> None:
        other = threading.Thread(target=cuda.wait)
        other.start()
        other.join()

    CudaRecorder(torch.device("cuda")).record(work)
    assert len(cuda.captures) == 1


def test_two_threads_record_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def record() -> None:
        CudaRecorder(torch.device("cuda")).record(lambda: time.sleep(0.01))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(cuda.captures)) == 4


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a limit of at least 1, got 0"):
        make_runner(0)


def test_work_is_repeated_as_often_as_asked() -> None:
    calls: list[int] = []
    replayable(lambda: calls.append(1), torch.device("cpu"), 7)()
    assert len(calls) == 7
    assert measure_ms(lambda: calls.append(1), torch.device("cpu")) > 0
