"""Is what a run exports an engine that gives the run's own answers, prompt and label map included?"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vpns.batches import iterate_split
from vpns.config import PromptConfig
from vpns.files import read_tensors
from vpns.run import execute, open_finished
from vpns.stages.pruned import load_pruned
from vpns_kernels import load
from vpns_kernels.engine import Artifact, ArtifactError, read_artifact


def export(folder: Path, tiny_task: ModuleType, **changes: object) -> Artifact:
    execute(folder, tiny_task.make_config(**changes), "eval")
    execute(folder, tiny_task.make_config(**changes), "export")
    return read_artifact(folder / "export" / "artifact", verify="all")


def answers(folder: Path) -> tuple[Tensor, Tensor]:
    """Of the stored engine and, from the stage eval, of the run; on the test images."""
    context = open_finished(folder)
    pruned = load_pruned(context)
    engine = load(folder / "export" / "artifact")
    images = [b.images for b in iterate_split(context.images.test, pruned.prompt.image_size, False)]
    outputs = read_tensors(folder / "eval" / "outputs.safetensors")
    name = "logits_prompted" if pruned.is_prompted else "logits"
    return torch.cat([engine(batch) for batch in images]), outputs[name]


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "channel"])
def test_a_run_leaves_as_an_engine_that_gives_its_answers(
    pattern: str, tmp_path: Path, tiny_task: ModuleType
) -> None:
    artifact = export(tmp_path, tiny_task, pattern=pattern, density=0.5)
    assert artifact.manifest["kind"] == "engine"
    assert {"model", "prompt", "label_map", "class_names", "method", "pattern", "density", "threshold",
            "made_with"} <= artifact.manifest.keys()  # fmt: skip
    assert artifact.plan.native
    # The prompt is part of the first convolution: nothing stands in front of it.
    first = artifact.plan.steps[0]
    assert (first.op, first.constant is not None) == ("conv2d", True)
    assert artifact.masks.keys() == {"conv1", "conv2", "fc"}
    # The label map is part of the head.
    assert artifact.plan.layers[-1].packed.geometry.out_channels == 10
    found, expected = answers(tmp_path)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    assert float((found.argmax(1) == expected.argmax(1)).double().mean()) > 0.95


def test_a_prompt_that_is_clamped_is_torchs_share_and_the_report_says_so(
    tmp_path: Path, tiny_task: ModuleType
) -> None:
    released = PromptConfig(variant="released", canvas=16, frame=2, at_inference=True)
    artifact = export(tmp_path, tiny_task, prompt=released)
    assert not artifact.plan.native
    engine = load(tmp_path / "export" / "artifact")
    assert "aten.clamp.default at 'prompt'" in str(engine.explain(quiet=True))
    found, expected = answers(tmp_path)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


class Untraceable(nn.Module):
    """Reads its own numbers: torch.export cannot follow."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        if float(x.detach().sum()) > 1e9:
            x = x + 1
        logits: Tensor = self.fc(x)
        return logits


def test_a_network_that_cannot_be_traced_leaves_as_layers_and_the_place_is_named(
    tmp_path: Path, tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny_task, "build", Untraceable)
    artifact = export(tmp_path, tiny_task)
    assert artifact.manifest["kind"] == "layers"
    assert "test_deploy.py" in artifact.manifest["why_not_an_engine"]
    assert "vpns: export: packed layers alone: compile: expected a network" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="its layers alone"):
        load(tmp_path / "export" / "artifact")
