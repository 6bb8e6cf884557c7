"""What tests of the trainer share."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images of tests do not stay in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPNS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module tiny_task, importable by its name also in processes that a test starts."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("tiny_task")


@contextmanager
def _full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` no file can grow beyond 4 KiB: settings fit, weights do not.

    A block and not the whole test: pytest writes its own progress to what may be a longer file.
    """
    return _full_disk
