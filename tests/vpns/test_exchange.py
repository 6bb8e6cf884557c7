"""Does a run leave as ONNX and as torch's state_dict, and does what is read back compute the same?"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vpns import cli
from vpns.config import RunConfig
from vpns.exchange import export_as
from vpns.files import read_json, read_tensors
from vpns.run import execute


def finish(folder: Path, config: RunConfig) -> Path:
    execute(folder, config, "export")
    return folder


def test_the_state_dict_loads_into_the_plain_network(
    tmp_path: Path, tiny_task: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finish(tmp_path, tiny_task.make_config())
    assert cli.main(["export", str(folder), "--format", "torch"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "export" / "network.pth")
    state: dict[str, Tensor] = torch.load(folder / "export" / "network.pth", weights_only=True)
    tuned = read_tensors(folder / "tune" / "weights.safetensors")
    assert state.keys() == tuned.keys()
    assert all(torch.equal(state[name], tuned[name]) for name in tuned)
    tiny_task.build(12).load_state_dict(state)
    # What was exported does not disturb the finished stage.
    assert cli.main(["export", str(folder)]) == 0


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_the_onnx_model_gives_the_logits_of_images(
    tmp_path: Path, tiny_task: ModuleType, pattern: str
) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    folder = finish(tmp_path, tiny_task.make_config(pattern=pattern, density=0.5))
    # It compares what it wrote with the run itself, for another batch than it was traced with.
    path = export_as(folder, "onnx")
    model = onnx.load(path)
    shapes = {tuple(tensor.dims) for tensor in model.graph.initializer}
    dense = {(8, 3, 3, 3), (8, 8, 3, 3), (12, 8)}
    assert (dense <= shapes) == (pattern == "unstructured")
    # Logits of the task's classes, of which the network has more.
    (classes,) = {output.type.tensor_type.shape.dim[1].dim_value for output in model.graph.output}
    assert classes == len(read_json(folder / "export" / "artifact" / "manifest.json")["class_names"]) < 12


def test_what_does_not_compute_the_same_is_not_exported_in_silence(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finish(tmp_path, tiny_task.make_config())
    monkeypatch.setattr(
        "vpns.exchange.torch.load", lambda path, weights_only: tiny_task.build(12).state_dict()
    )
    with pytest.raises(
        RuntimeError, match=r"expected .*network.pth to compute the run's logits, got some off"
    ):
        export_as(folder, "torch")


def test_without_the_extra_the_message_names_it(
    tmp_path: Path,
    tiny_task: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = finish(tmp_path, tiny_task.make_config())
    monkeypatch.setattr("vpns_kernels.onnx_file.find_spec", lambda name: None)
    assert cli.main(["export", str(folder), "--format", "onnx"]) == 2
    assert "pip install -c constraints.txt -e '.[onnx]'" in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "export" / "network.onnx").exists()
