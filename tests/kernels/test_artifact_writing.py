"""Does a writer leave the old artifact or the new one, whatever stops it?"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.artifacts import (
    LINEAR,
    leftovers,
    make_layer,
    write_sample,
)
from vpns_kernels import Packed, parse_pattern
from vpns_kernels.engine import ArtifactError, PlanLayer, read_artifact, write_artifact


def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(
        ArtifactError, match=r"expected no folder or an artifact .*\(write elsewhere: nothing but an"
    ):
        write_sample(other)
    assert (other / "thesis.txt").read_text() == "precious"
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        write_sample(folder, "new")
    assert (folder / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(
        ArtifactError, match=r"expected no folder or an artifact .*\(write elsewhere: nothing but an"
    ):
        write_sample(tmp_path / "file")
    assert leftovers(folder) == ["file", "other"]


def test_an_artifact_is_replaced_also_through_a_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    write_sample(tmp_path / "link", "new", weights=False)
    assert (tmp_path / "link").is_symlink()
    assert read_artifact(folder).manifest["label"] == "new"
    assert not (folder / "weights.safetensors").exists()
    assert leftovers(folder) == ["link"]


@pytest.mark.parametrize("field", ["format_version", "files", "digest"])
def test_reserved_fields_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        write_artifact(tmp_path / "a", {field: 1}, [], {})


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layer, mask = make_layer("twice", "unstructured", LINEAR)
    with pytest.raises(ValueError, match="JSON"):
        write_artifact(tmp_path / "a", {"loss": float("nan")}, [], {})
    with pytest.raises(ValueError, match="unique layer names"):
        write_artifact(tmp_path / "a", {}, [layer, layer], {})
    with pytest.raises(ValueError, match="bool mask"):
        write_artifact(tmp_path / "a", {}, [], {"m": mask.float()})
    with pytest.raises(ValueError, match="floating bias"):
        PlanLayer("b", "linear", layer.packed, torch.zeros(5))
    with pytest.raises(ValueError, match="values of channel"):
        PlanLayer(
            "b", "linear", Packed(layer.packed.values, layer.packed.layout, parse_pattern("channel"), LINEAR)
        )
    nothing = [torch.zeros(n, dtype=torch.int32) for n in (2, 0, 11, 0, 0)]
    with pytest.raises(ValueError, match=r"2\^31 entries in whole blocks"):
        PlanLayer(
            "huge blocks of which there are none",
            "linear",
            Packed(
                torch.zeros(0, 2**20, 2**20), tuple(nothing), parse_pattern("block:1048576x1048576"), LINEAR
            ),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_regular_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OSError, match=r"cannot write .*: Not a directory"):
            write_sample(folder)
        with pytest.raises(ArtifactError, match="Not a directory"):
            read_artifact(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from vpns_kernels.engine import read_artifact, write_artifact
folder, weights = Path(sys.argv[1]), {"w": torch.zeros(300_000)}
for limit in (100, 50_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    masks = {"m": torch.zeros(800_000, dtype=torch.bool)}
    for target in (folder, folder.with_name("fresh")):
        try:
            write_artifact(target, {"label": "new"}, [], masks, weights)
            sys.exit("it was written")
        except OSError as error:
            assert "cannot write" in str(error) and "File too large" in str(error), error
assert read_artifact(folder, verify="all").manifest["label"] == "old"
"""


def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], check=True, timeout=60)
    assert leftovers(folder) == []
    read_artifact(folder, verify="all")


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_before(operation: int) -> None:
    """From now on, end this process just before its n-th operation on files, as a power cut would."""
    count = 0

    def step() -> None:
        nonlocal count
        if count == operation:
            os._exit(9)
        count += 1

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            step()

    sync = os.fsync

    def sync_or_die(fd: Any) -> None:
        step()
        sync(fd)

    os.fsync = sync_or_die
    sys.addaudithook(watch)


def write_and_die(folder: Path, label: str, operation: int) -> bool:
    """Whether the writer, a process of its own, lived to its end."""
    with warnings.catch_warnings():
        # Forking a process with threads; the child does nothing that needs them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            die_before(operation)
            write_artifact(
                folder, {"label": label}, [], {"m": torch.ones(9, dtype=torch.bool)}, {"w": torch.ones(5)}
            )
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_a_writer_killed_before_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found, operation, is_done = [], 0, False
    while not is_done:
        folder = tmp_path / f"{operation}" / "artifact"
        write_sample(folder, small=True)
        is_done = write_and_die(folder, "new", operation)
        found.append(read_artifact(folder, verify="all").manifest["label"])
        # What was left must not stop the next writer, and goes with it.
        write_sample(folder, "next", small=True)
        assert read_artifact(folder, verify="all").manifest["label"] == "next"
        assert leftovers(folder) == []
        operation += 1
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}
    assert len(found) > 25


def test_a_first_writer_killed_before_any_file_operation_leaves_nothing_or_all(tmp_path: Path) -> None:
    is_there, operation, is_done = [], 0, False
    while not is_done:
        folder = tmp_path / f"{operation}" / "artifact"
        is_done = write_and_die(folder, "new", operation)
        try:
            is_there.append(read_artifact(folder, verify="all").manifest["label"] == "new")
        except ArtifactError:
            assert not folder.exists()
            is_there.append(False)
        write_sample(folder, "next", small=True)
        assert leftovers(folder) == []
        operation += 1
    assert is_there == sorted(is_there)
    assert set(is_there) == {False, True}


def test_a_failure_at_any_file_operation_leaves_the_old_artifact_and_nothing_else(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors instead of kills. Where only the last sync fails, the new one is there, the old one aside."""
    for name, new_after_error in (("mkdir", 0), ("rename", 0), ("fsync", 1)):
        found: list[tuple[bool, str, bool]] = []
        while not found or found[-1][0]:
            write_sample(small, small=True)
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail_at(getattr(os, name), len(found)))
                has_failed = is_failing(small)
            label = read_artifact(small, verify="all").manifest["label"]
            found.append((has_failed, label, leftovers(small) == []))
        assert found[-1] == (False, "new", True)
        last = len(found) - 1 - new_after_error
        assert found[:last] == [(True, "old", True)] * last
        assert found[last:-1] == [(True, "new", False)] * new_after_error
        assert last > 0


def fail_at(function: Callable[..., Any], failing: int) -> Callable[..., Any]:
    calls = iter(range(1000))

    def fail(*args: Any, **named: Any) -> Any:
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        return function(*args, **named)

    return fail


def is_failing(folder: Path) -> bool:
    try:
        write_sample(folder, "new", small=True)
    except OSError as error:
        return "cannot write" in str(error) and "Input/output error" in str(error)
    return False


def test_readers_see_the_old_or_the_new_while_it_is_replaced_again_and_again(folder: Path) -> None:
    write_artifact(folder, {"label": "0"}, [], {"m": torch.tensor([False])})
    stop, labels = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            artifact = read_artifact(folder, verify="all")
            assert int(artifact.masks["m"].numel()) == int(artifact.manifest["label"]) + 1
            labels.append(int(artifact.manifest["label"]))

    failures: list[BaseException] = []

    def read_and_tell() -> None:
        try:
            read()
        except BaseException as error:
            failures.append(error)
            raise

    reader = threading.Thread(target=read_and_tell)
    reader.start()
    for number in range(1, 25):
        write_artifact(folder, {"label": str(number)}, [], {"m": torch.zeros(number + 1, dtype=torch.bool)})
    stop.set()
    reader.join()
    assert failures == []
    assert labels == sorted(labels)
    assert len(set(labels)) > 3
