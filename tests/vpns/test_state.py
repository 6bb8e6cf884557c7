"""Do files appear whole or not at all, is damage named, and does one process alone hold a folder?"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from vpns.files import make_folder, read_json, read_tensors, write_json, write_tensors
from vpns.metrics import MetricsLog
from vpns.observe import EpochMetrics
from vpns.state import (
    StageRecord,
    finish_stage,
    list_outputs,
    load_state,
    lock_folder,
    read_stage,
    save_state,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(True), "c": torch.zeros(0, 3)}


def finish_tiny_stage(folder: Path) -> StageRecord:
    write_tensors(folder / "weights.safetensors", TENSORS)
    record = StageRecord({"accuracy": 12.5}, list_outputs(folder), {"before": "digest"})
    finish_stage(folder, record)
    return record


def metrics_of(stage: str, epoch: int) -> EpochMetrics:
    return EpochMetrics(stage, epoch, 3 * epoch, 0.5, 50.0, 40.0, 0.1, 3 * epoch, 60 * epoch, 1.5)


def test_tensors_come_back_as_they_were_saved(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_state_is_replaced_by_the_next_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for epoch in range(3):
        save_state(tmp_path, {"x": torch.full((3,), float(epoch))}, {"epoch": epoch})
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded[0]["x"].tolist() == [2.0] * 3
    assert loaded[1] == {"epoch": 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_stage_is_read_back_and_drops_its_state(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {})
    record = finish_tiny_stage(tmp_path)
    assert read_stage(tmp_path) == record
    assert {path.name for path in tmp_path.iterdir()} == {"stage.json", "weights.safetensors"}
    assert list(record.outputs) == ["weights.safetensors"]


def test_a_stage_that_has_not_finished_has_no_record(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", TENSORS)
    assert read_stage(tmp_path) is None


@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_flipped_bit_of_an_output_is_named(tmp_path: Path, where: int) -> None:
    finish_tiny_stage(tmp_path)
    path = tmp_path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected sha256 .* of .*weights\.safetensors, got .*damaged"):
        read_stage(tmp_path)


def test_a_missing_output_is_named(tmp_path: Path) -> None:
    finish_tiny_stage(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected the file .*weights\.safetensors, got none"):
        read_stage(tmp_path)


def test_a_truncated_state_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {})
    path = next(tmp_path.glob("state-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"of .*{path.name}, got"):
        load_state(tmp_path)


def test_a_manifest_that_is_no_json_or_newer_is_named(tmp_path: Path) -> None:
    finish_tiny_stage(tmp_path)
    path = tmp_path / "stage.json"
    content = read_json(path)
    write_json(path, content | {"schema_version": 2})
    with pytest.raises(ValueError, match=r"expected schema_version 1 in .*, got 2"):
        read_stage(tmp_path)
    for text in ("{", "[]", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"expected (a )?JSON.* in .*stage\.json"):
            read_stage(tmp_path)


def test_json_never_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error_and_the_old_state_stays(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    save_state(tmp_path, {"x": torch.zeros(10)}, {"epoch": 1})
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*safetensors: .*too large.*stays valid"):
        save_state(tmp_path, {"x": torch.zeros(5000)}, {"epoch": 2})
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*x\.json: .*too large"):
        write_json(tmp_path / "x.json", {"x": "y" * 5000})
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded[1] == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/run: Not a directory"):
        make_folder(tmp_path / "file" / "run")


def test_two_holders_of_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path),
        pytest.raises(OSError, match="another process works in it"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):
        pass


def test_metrics_rewind_to_what_a_state_knows(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for stage, epoch in (("search", 1), ("tune", 1), ("tune", 2)):
        log.append(metrics_of(stage, epoch))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tu')
    log.rewind("tune", 1)
    assert [(row["stage"], row["epoch"]) for row in log.rows()] == [("search", 1), ("tune", 1)]
    log.write_csv()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",") == list(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]))
    assert lines[2].startswith("tune,1,3,0.5,")
    assert len(lines) == 3


def test_a_damaged_row_of_the_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "tune"}\n{"sta\n')
    with pytest.raises(ValueError, match=r"expected JSON in line 2 of .*metrics\.jsonl"):
        MetricsLog(tmp_path).rows()
