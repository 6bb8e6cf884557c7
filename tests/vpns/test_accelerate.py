"""Does a stage's faster predictor compute what the plain one does, over the same tensors?"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpns.accelerate
from vpns.accelerate import FusedPredictor, choose_backends, fuse_predictor, set_backends
from vpns.config import PromptConfig
from vpns.files import read_json, write_json
from vpns.masking import attach_masks, refresh
from vpns.methods import METHODS, Start
from vpns.observe import Observer, Step
from vpns.predictor import Predictor
from vpns.prompt import build_prompt
from vpns.prompt.base import MEAN, STD
from vpns.prompt.stem import PromptedStem
from vpns.run import execute
from vpns_kernels.convert import freeze, mask_modules, sparsify, weight_masks
from vpns_kernels.patterns import parse_pattern

PROMPTS = {
    "framed": PromptConfig(canvas=16, frame=2),
    "released": PromptConfig(variant="released", canvas=16, frame=2),
    "none": PromptConfig(kind="none", canvas=16),
}
PATTERNS = ("unstructured", "block:4x4", "channel")
STAGES = ("search", "tune")


def make_predictor(tiny_task: ModuleType, prompt: str, spec: str, stage: str) -> Predictor:
    """As search or tune begins, in float64."""
    torch.manual_seed(0)
    plain, pattern = tiny_task.build(12), parse_pattern(spec)
    scores = METHODS["vpns"].start_scores(Start(plain, None, pattern, 0))
    network: nn.Module = attach_masks(plain, pattern, scores)
    refresh(network, pattern, 0.5, "exact")
    if stage == "tune":
        network = sparsify(freeze(network), weight_masks(network), pattern).requires_grad_(True)
    # No chance, which torch's dense layers and a traced network would draw alike but at other moments.
    network.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    built = build_prompt(PROMPTS[prompt])
    if built.raw is not None:
        nn.init.normal_(built.raw)
    predictor = Predictor(built, network).double()
    # Not as rounded to float32, where they were made.
    for buffer, values in ((built.mean, MEAN), (built.std, STD)):
        buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer))
    return predictor


def learn(predictor: Predictor, images: Tensor, prompted: bool = True) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of one pass."""
    predictor.zero_grad()
    logits = predictor(images, prompted)
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    parts = (("network.", predictor.network), ("prompt.", predictor.prompt))
    found = {f"{p}{n}": t.grad for p, m in parts for n, t in m.named_parameters() if t.grad is not None}
    found |= {n: b.clone() for n, b in predictor.network.named_buffers() if "running" in n}
    return found | {"logits": logits.detach()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_gradients_and_statistics_are_those_of_the_plain_predictor(
    tiny_task: ModuleType, prompt: str, spec: str, stage: str
) -> None:
    plain = make_predictor(tiny_task, prompt, spec, stage)
    fused, done = fuse_predictor(copy.deepcopy(plain))
    assert isinstance(fused, FusedPredictor)
    kept = ["conv2"] if (spec, stage) == ("channel", "search") else []
    assert done == {"prompted_stem": "fused", "batch_norms": ["bn1", "bn2"], "kept_channels": kept}
    images = torch.rand(4, 3, plain.prompt.image_size, plain.prompt.image_size, dtype=torch.float64)
    for prompted in (True, False):
        expected, found = learn(plain, images, prompted), learn(fused, images, prompted)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)) < 1e-9, name
    plain.eval(), fused.eval()
    torch.testing.assert_close(fused(images, True), plain(images, True))


def test_the_faster_predictor_trains_the_very_tensors_of_the_network(tiny_task: ModuleType) -> None:
    plain = make_predictor(tiny_task, "framed", "block:4x4", "search")
    fused, _ = fuse_predictor(plain)
    assert fused.network is plain.network
    own = {id(p) for p in (*plain.network.parameters(), *plain.prompt.parameters())}
    assert {id(p) for p in fused.parameters()} == own
    assert any(isinstance(module, PromptedStem) for module in fused.modules())


def test_a_network_that_cannot_be_traced_runs_as_it_is(tiny_task: ModuleType) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3))

    plain = Predictor(build_prompt(PROMPTS["framed"]), Branching())
    same, done = fuse_predictor(plain)
    assert same is plain
    assert "cannot trace" in done["prompted_stem"]


@pytest.mark.parametrize("change", ["twice", "grouped", "grey", "padding"])
def test_a_stem_that_the_op_does_not_take_stays_with_the_reason(change: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups = 3 if change == "grouped" else 1
            mode = "reflect" if change == "padding" else "zeros"
            self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=groups, padding_mode=mode)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x.mul(2) if change == "grey" else x)
            return self.conv(x) + y if change == "twice" else y

    plain = Predictor(build_prompt(PROMPTS["framed"]), Odd())
    fused, done = fuse_predictor(plain)
    assert done["prompted_stem"] != "fused"
    assert len(done["prompted_stem"]) > 10
    images = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(fused(images, True), plain(images, True))


@pytest.mark.parametrize("stage", STAGES)
def test_every_layer_is_told_its_backends_and_the_network_is_left_alone(
    tiny_task: ModuleType, stage: str
) -> None:
    predictor = make_predictor(tiny_task, "framed", "block:4x4", stage).float().train()
    before = copy.deepcopy(predictor.state_dict())
    chosen = choose_backends(predictor, torch.zeros(5, 3, 12, 12))
    assert list(chosen) == ["conv1", "conv2", "fc"]
    for row in chosen.values():
        assert set(row["backends"]) <= {"cpu", "compact", "reference"}
        assert all(" ms" in reason or "need" in reason for reason in row["reasons"].values())
    again = choose_backends(predictor, torch.ones(5, 3, 12, 12))
    assert again == chosen
    assert predictor.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in predictor.state_dict().items())
    set_backends(predictor.network, chosen)
    assert predictor.network.get_submodule("conv2").backends == tuple(chosen["conv2"]["backends"])
    set_backends(predictor.network, "reference")
    assert predictor.network.get_submodule("conv2").backends == "reference"
    with pytest.raises(ValueError, match="expected a choice for 'fc', got"):
        set_backends(predictor.network, {"conv1": chosen["conv1"], "conv2": chosen["conv2"]})


@pytest.mark.parametrize(
    ("spec", "backend", "reason"),
    [
        ("block:16x16", "triton", "triton: no costs were measured on this GPU; blocks of 16x16"),
        ("block:4x4", "reference", "dense: no costs were measured on this GPU; triton: it takes blocks"),
        ("unstructured", "reference", "triton: it takes blocks and channels"),
    ],
)
def test_on_a_gpu_the_layers_sizes_decide_and_the_reason_is_given(
    tiny_task: ModuleType, monkeypatch: pytest.MonkeyPatch, spec: str, backend: str, reason: str
) -> None:
    predictor = make_predictor(tiny_task, "framed", spec, "search").float()
    for layer in mask_modules(predictor.network).values():
        # Of conv1 one block of nine, of the others none.
        layer.mask.zero_()
        layer.mask.view(-1)[0] = layer.mask.numel() > 1
    # The shapes are those of the CPU: torch's autocast, which layers ask, knows no meta device.
    shapes = vpns.accelerate._input_shapes(predictor, torch.zeros(5, 3, 12, 12))
    monkeypatch.setattr(vpns.accelerate, "_input_shapes", lambda *_: shapes)
    chosen = choose_backends(predictor, torch.zeros(5, 3, 12, 12, device="meta"))
    assert list(chosen) == ["conv1", "conv2", "fc"]
    assert all(row["backends"] == [backend] * 3 for row in chosen.values())
    assert reason in chosen["fc"]["reasons"]["forward"]
    assert choose_backends(predictor, torch.zeros(5, 3, 12, 12, device="meta")) == chosen


def test_a_run_leaves_what_was_fused_and_chosen_in_its_folder(tiny_task: ModuleType, tmp_path: Path) -> None:
    execute(tmp_path, tiny_task.make_config(), "tune")
    for stage in STAGES:
        choice = read_json(tmp_path / stage / "choice.json")
        assert choice["fused"] == {
            "prompted_stem": "fused",
            "batch_norms": ["bn1", "bn2"],
            "kept_channels": [],
        }
        assert list(choice["layers"]) == ["conv1", "conv2", "fc"]


def test_kernels_of_another_device_are_chosen_anew(tiny_task: ModuleType, tmp_path: Path) -> None:
    config = tiny_task.make_config(save_every_s=0.0)
    whole = execute(tmp_path / "whole", config, "search")

    class Stop(Observer):
        def on_step(self, step: Step) -> None:
            if step.stage == "search":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / "run", config, "search", [Stop()])
    path = tmp_path / "run" / "search" / "choice.json"
    on_gpu = {name: {"backends": ["triton"] * 3} for name in read_json(path)["layers"]}
    write_json(path, read_json(path) | {"device": "cuda", "layers": on_gpu})
    resumed = execute(tmp_path / "run", config, "search")
    assert read_json(path) == read_json(tmp_path / "whole" / "search" / "choice.json")
    assert resumed["search"].outputs == whole["search"].outputs


def test_bfloat16_keeps_parameters_and_logits_in_float32(tiny_task: ModuleType) -> None:
    predictor = make_predictor(tiny_task, "framed", "block:4x4", "search").float()
    half = Predictor(predictor.prompt, predictor.network, torch.bfloat16)
    fused, _ = fuse_predictor(half)
    seen = []
    fused.twin.get_submodule("bn1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images = torch.rand(4, 3, 12, 12)
    found, expected = learn(fused, images), learn(predictor, images)
    assert seen == [torch.bfloat16]
    assert found["logits"].dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert float((found["logits"] - expected["logits"]).norm() / expected["logits"].norm()) < 0.05
    assert len(mask_modules(half.network)) == 3
