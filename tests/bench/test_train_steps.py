"""Does the bench of training run the trainer's own steps, against the published scheme?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import bench_train, train_memory, train_runs
from bench.train_loops import Arm, Cell, build_loop, start_scores
from bench.train_memory import measure_memory
from bench.train_published import publish
from bench.train_steps import bench_iterations
from tests.bench.training_rows import SIZES, tiny
from tests.vpns.released_transcription import Released, resnet18
from vpns.config import ModelConfig
from vpns.models import MODELS, build_model
from vpns_kernels import parse_pattern
from vpns_kernels.measure import Laps
from vpns_kernels.modules import MaskedConv2d
from vpns_kernels.sparse_modules import SparseConv2d


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", tiny)


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def keeping_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C library does with memory is a matter of the whole process, here that of the tests."""
    for module in (bench_train, train_memory):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_the_opponent_is_the_published_scheme(stage: str) -> None:
    network = build_model(ModelConfig("resnet18"), 12, 3)
    released = Released(network.state_dict(), resnet18, canvas=32, frame=4, density=0.1)
    released.sequence = list(range(12))
    (released.begin_mask_finding if stage == "search" else released.begin_tuning)(1)
    for optimizer in released.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 if stage == "search" else 1e-3
    published = publish(network, stage, "released", 32, 4, 0.1, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for prompted in (True, False):
        images, labels = torch.rand(3, 3, 32, 32, generator=generator), torch.tensor([1, 0, 7])
        loss = released.update(images, labels, prompted)
        published.optimizer.zero_grad()
        # The network casts its answer to float32.
        logits = published.predictor.network((published_canvas(published, images, prompted) - MEAN) / STD)
        found = nn.functional.cross_entropy(logits, labels)
        assert found.item() == pytest.approx(loss, rel=1e-9)
        found.backward()
        published.optimizer.step()
        if published.threshold is not None:
            published.threshold.update()
            assert float(published.threshold.tau) == pytest.approx(released.tau, rel=1e-9)
    state = network.state_dict()
    for name, expected in released.state.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-7, atol=1e-9)
    for name, expected in released.scores.items():
        torch.testing.assert_close(state[f"{name}.scores"], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(published.predictor.prompt, released.prompt, rtol=1e-7, atol=1e-9)


MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)


def published_canvas(published: Any, images: Tensor, prompted: bool) -> Tensor:
    predictor = published.predictor
    return (images + predictor.prompt * predictor.frame_mask).clamp(0, 1) if prompted else images


@pytest.mark.parametrize("variant", ["released", "framed"])
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_iterations_are_the_trainers_own_and_mark_their_phases(stage: str, variant: str) -> None:
    arms = [Arm("torch", "float32", 0.25), Arm("torch", "bfloat16", 0.25)]
    arms += [Arm("ours", "float32", 0.25), Arm("ours", "bfloat16", 0.25, "block:4x4", prompt_in="none")]
    rows = bench_iterations(Cell(stage, variant, 4), arms, SIZES, rounds=2)
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    for row in rows:
        assert set(row["phases"]) == {"batch", "forward", "backward", "optimizer", "refresh"}
        assert row["updates"] == (2 if variant == "released" else 1)
        assert row["model"] == SIZES.model
        whole = row["iteration"]["median_ms"]
        assert row["ms_per_image"] == pytest.approx(whole / (4 * row["updates"]))
        assert set(row["ratios"]) == ({"torch float32", "torch bfloat16"} if row["who"] == "ours" else set())
    assert rows[2]["layer_density"] == pytest.approx({"0": 0.25, "3": 0.25, "6": 0.25}, abs=0.02)
    json.dumps(rows)


def test_an_iteration_learns_what_its_stage_learns(tmp_path: Path) -> None:
    for stage, layer in (("search", MaskedConv2d), ("tune", SparseConv2d)):
        loop = build_loop(Arm("ours", "float32", 0.25), Cell(stage, "framed", 4), SIZES, tmp_path)
        network = loop.learner.predictor.predictor.network
        assert isinstance(network[3], layer)
        learned = network[3].scores if stage == "search" else network[3].values
        before = learned.detach().clone()
        loop(Laps())
        assert not torch.equal(learned, before)
        assert network.training


def test_an_engine_that_stops_says_why_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: nn.Module, **_: Any) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no C++ compiler")

        return Broken()

    monkeypatch.setattr(torch, "compile", fail)
    arms = [
        Arm("torch.compile", "bfloat16", 0.25),
        Arm("torch", "float32", 0.25),
        Arm("ours", "float32", 0.25),
    ]
    rows = bench_iterations(Cell("search", "released", 4), arms, SIZES, rounds=1)
    assert rows[0]["why_not"] == "torch.compile stopped: no C++ compiler"
    assert rows[0]["iteration"] is None
    assert list(rows[2]["ratios"]) == ["torch float32"]


def test_memory_is_that_of_three_iterations_above_the_imports() -> None:
    wanted = {"cell": {"stage": "tune", "variant": "framed", "batch": 4}}
    wanted |= {"arm": {"who": "ours", "dtype": "float32", "density": 0.25}}
    found = measure_memory(json.dumps(wanted | {"sizes": vars(SIZES)}))
    assert 0 < found["imported_mb"] <= found["peak_mb"]
    assert found["added_mb"] == pytest.approx(found["peak_mb"] - found["imported_mb"], abs=1)


def test_runs_are_compared_with_the_reference_and_two_at_once_with_a_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[int, int]] = []

    class Fake(train_runs._Runs):
        def pretrain(self) -> None:
            started.append((0, 0))

        def finish(self, forms: Any, threads: int) -> None:
            started.append((len(forms), threads))
            for form in forms:
                self.stages.setdefault(form, []).append({"search": 2.0, "tune": 1.0})

    monkeypatch.setattr(train_runs, "_Runs", Fake)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    forms = [train_runs.FORMS[0], train_runs.REFERENCE]
    ours, reference, both = train_runs.bench_runs(1, (), forms)
    assert started == [(0, 0), (1, 4), (1, 4), (1, 4), (1, 4), (2, 2)]
    assert list(ours["ratios"]) == [reference["form"]] == ["reference unstructured float32"]
    assert reference["ratios"] == {}
    assert ours["stage_seconds"] == {"search": 2.0, "tune": 1.0}
    assert ours["runs_per_hour"] == pytest.approx(3600 / ours["seconds"])
    assert both["throughput"]["median"] == pytest.approx(both["sequence_seconds"] / both["seconds"])


@pytest.mark.long
def test_runs_go_through_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "vpns"))
    settings = ["--model.name=tiny_task:build", "--model.source_classes=12", "--prompt.canvas=16"]
    settings += ["--pretrain.epochs=0", "--search.epochs=1", "--tune.epochs=1", "--data.train_count=60"]
    rows = train_runs.bench_runs(1, settings, [train_runs.FORMS[0], train_runs.REFERENCE])
    assert all(row["seconds"] > 0 for row in rows)
    with pytest.raises(RuntimeError, match=r"expected a run to finish, got exit code 2.*epochs"):
        train_runs.bench_runs(1, ["--search.epochs=-1"])


def test_start_scores_are_uniform_or_those_of_the_method() -> None:
    network = build_model(ModelConfig("tiny"), 12, 0)
    pattern = parse_pattern("unstructured")
    uniform = start_scores(network, pattern, "uniform", 0)
    for scores in uniform.values():
        assert float((scores.abs() >= 0.5).double().mean()) == pytest.approx(0.5, abs=0.01)
    method = start_scores(network, pattern, "method", 0)
    assert set(method) == set(uniform)
    assert not torch.equal(method["0"], uniform["0"])
