"""Does a GPU's engine give what torch gives? Its steps are run here on the CPU, without recordings."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources, PTXASError

from tests.kernels import networks, test_engine_framed, test_engine_torch
from tests.kernels.test_engine import PATTERNS, assert_close, build, images, lowered, prune
from vpns_kernels import compile, load
from vpns_kernels.engine import GpuEngine, Plan, gpu_steps
from vpns_kernels.engine.gpu_compile import build_engine, can_keep, choose_kernels, open_on_device
from vpns_kernels.engine.gpu_kernels import KERNELS
from vpns_kernels.engine.gpu_weights import LayerWeights
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.parts import TorchPart
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network

CPU = torch.device("cpu")


def plan_of(network: nn.Module, x: Tensor) -> tuple[Plan, list[Any]]:
    steps = lower(trace_network(network, x))
    return draft_plan(steps, torch.float32, {}), steps.programs


@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("name", networks.ALL)
def test_a_network_gives_what_it_gives_in_torch(name: str, spec: str) -> None:
    network, steps = lowered(name, spec)
    for is_sparse in (True, False):
        chosen = dict.fromkeys([step.name for step in draft_plan(steps, torch.float32, {}).steps], is_sparse)
        plan = draft_plan(steps, torch.float32, chosen)
        assert_close(GpuEngine(plan, "cpu"), network, images(5), torch.float32)


@pytest.mark.parametrize("spec", ["block:4x2", "channel"])
def test_every_kernel_that_takes_a_layer_gives_the_same(spec: str) -> None:
    network, steps = lowered("residual", spec)
    plan, used = draft_plan(steps, torch.float32, {}), set()
    for step in plan.steps:
        if step.layer is None:
            continue
        weights = LayerWeights.of_step(plan, step, CPU)
        for name in [name for name, kind in KERNELS.items() if kind.why_not(weights) is None]:
            assert_close(GpuEngine(plan, "cpu", {step.name: name}), network, images(3), torch.float32)
            used.add(name)
    assert used >= ({"dense", "compact"} if spec == "channel" else {"dense"})


def test_a_kernel_that_does_not_take_its_layer_is_refused_with_the_reason() -> None:
    _, steps = lowered("residual", "block:4x2")
    plan = draft_plan(steps, torch.float32, {})
    with pytest.raises(
        ValueError, match="takes conv1, got 'semi-structured': it takes linear layers and 1x1"
    ):
        GpuEngine(plan, "cpu", {"conv1": "semi-structured"})
    with pytest.raises(ValueError, match=r"expected a kernel in .* for conv1, got 'amx'"):
        GpuEngine(plan, "cpu", {"conv1": "amx"})


@pytest.mark.parametrize("kind", ["7x7/2", "patches"])
def test_a_framed_prompt_is_added_where_images_are_seen_and_not(kind: str) -> None:
    torch.manual_seed(3)
    conv = test_engine_framed.CONVOLUTIONS[kind]()
    network = test_engine_framed.build(test_engine_framed.Framed(5, conv))
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    plan, programs = plan_of(network, x)
    assert not programs
    assert any(step.constant is not None for step in plan.steps)
    assert_close(GpuEngine(plan, "cpu"), network, x, torch.float32)


def test_what_is_left_to_torch_runs_on_the_device_between_the_others() -> None:
    network = test_engine_torch.Attentive().eval()
    plan, programs = plan_of(network, images(2))
    assert programs
    engine = GpuEngine(plan, "cpu", programs=programs)
    for count in (1, 4, 0):
        x = images(count)
        with torch.no_grad():
            torch.testing.assert_close(engine(x), network(x))
    assert engine.programs == tuple(programs)


def test_values_are_dropped_once_their_last_reader_is_through() -> None:
    _, steps = lowered("residual", "block:4x2")
    engine = GpuEngine(draft_plan(steps, torch.float32, {}), "cpu")
    seen = []
    for part in engine.parts:
        run = part.run

        def watched(tensors: dict[int, Tensor], *rest: Any, run: Callable[..., None] = run) -> None:
            run(tensors, *rest)
            seen.append(len(tensors))

        part.run = watched  # type: ignore[method-assign]
    engine(images(2))
    # The residual, what is read and what is written, and the input, which is the caller's.
    assert max(seen) <= 4 < len(engine.plan.values)


def test_choosing_reports_each_layer_with_its_times_and_what_else_does_not_take_it(tmp_path: Path) -> None:
    network = prune(build("residual"), "block:4x2").eval()
    x = images(2)
    plan, programs = plan_of(network, x)
    engine = choose_kernels(plan, programs, CPU, x)
    assert_close(engine, network, x, torch.float32)
    report = engine.explain(quiet=True)
    rows = {row["name"]: row for row in report.rows()}
    assert rows["conv1"]["kernel"] == "dense"
    assert rows["conv1"]["dense_ms"] > 0
    assert "compact: it takes whole channels" in rows["conv1"]["reason"]
    assert "triton: " in rows["conv1"]["reason"]
    assert "torch on the cpu" in str(report)
    assert len(engine.profile(x)) == len(plan.steps)
    assert [step.kernel for step in engine.plan.steps] == engine.kernels

    engine.save(tmp_path / "engine")
    again = load(tmp_path / "engine")
    assert_close(again, network, x, torch.float32)
    assert any("compiled for dense, which this CPU lacks" in note for note in again.explain(True).notes)


def test_channels_run_as_the_smaller_layer_they_are_and_its_time_stands_beside_dense() -> None:
    network = prune(build("vgg"), "channel").eval()
    plan, programs = plan_of(network, images(2))
    report = choose_kernels(plan, programs, CPU, images(2)).explain(quiet=True)
    layers = [row for row in report.rows() if row["sparse_ms"] is not None]
    assert layers
    assert all(row["dense_ms"] is not None for row in layers)
    assert all(row["kernel"] in ("dense", "compact") for row in layers)


def test_an_engine_for_the_cpu_is_chosen_for_anew_on_a_device_and_one_for_a_gpu_is_kept() -> None:
    network = prune(build("residual"), "channel").eval()
    compiled = compile(network, images(2), dtype="float32")
    assert not can_keep(compiled.plan, CPU)
    first = open_on_device(compiled.plan, compiled.reports, (), CPU, 2)
    assert set(first.kernels) <= {"", "dense", "compact"}
    assert_close(first, network, images(3), torch.float32)
    assert can_keep(first.plan, CPU)
    second = open_on_device(first.plan, first.reports, (), CPU, 2)
    assert second.kernels == first.kernels
    assert second.reports == first.reports


def test_a_layer_that_ran_faster_whole_elsewhere_still_knows_what_was_pruned() -> None:
    _, steps = lowered("residual", "channel")
    names = [step.name for step in draft_plan(steps, torch.float32, {}).steps]
    plan = draft_plan(steps, torch.float32, dict.fromkeys(names, False))
    pruned = [LayerWeights.of_step(plan, s, CPU).packed for s in plan.steps if s.layer is not None]
    assert any(packed is not None and packed.density < 1 for packed in pruned)


def test_a_stored_engine_of_both_is_chosen_for_anew_with_its_reasons(tmp_path: Path) -> None:
    network = test_engine_torch.Attentive().eval()
    compile(network, images(2), dtype="float32").save(tmp_path / "engine")
    stored = load(tmp_path / "engine")
    engine = open_on_device(stored.plan, stored.reports, stored.programs, CPU, 2)
    with torch.no_grad():
        torch.testing.assert_close(engine(images(3)), network(images(3)))
    notes = [row["reason"] for row in engine.explain(quiet=True).rows() if row["op"] == "torch"]
    assert notes
    assert notes[0].startswith("left to torch: ")
    assert "at a time" not in str(engine.explain(quiet=True))
    engine.save(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(images(3)), engine(images(3)))


class NoRecorder:
    """Can record nothing."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        raise RuntimeError("an operation not permitted when stream is capturing\nmore")

    def turn(self) -> Any:
        return nullcontext()

    def hand_over(self, tensor: Tensor) -> Tensor:
        return tensor


def test_programs_that_cannot_be_recorded_are_run_anew_and_the_report_says_so() -> None:
    network = test_engine_torch.Attentive().eval()
    plan, programs = plan_of(network, images(2))
    measured = choose_kernels(plan, programs, CPU, images(2))
    arguments = (measured.plan, CPU, {}, measured.reports, programs, images(2))
    engine = build_engine(*arguments, recorder=NoRecorder())
    with torch.no_grad():
        torch.testing.assert_close(engine(images(3)), network(images(3)))
    reasons = [row["reason"] for row in engine.explain(quiet=True).rows() if row["op"] == "torch"]
    assert reasons
    assert all(re.search("each call starts all steps anew, .* stream is capturing", why) for why in reasons)
    # What we run can always be recorded: there it is an error.
    plan, _ = plan_of(build("vgg"), images(2))
    with pytest.raises(RuntimeError, match="not permitted"):
        build_engine(plan, CPU, {}, (), (), images(2), recorder=NoRecorder())(images(2))


def test_a_program_that_waits_for_the_host_is_timed_without_a_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, programs = plan_of(test_engine_torch.Attentive().eval(), images(2))
    asked: list[bool] = []

    def measure(work: Callable[[], object], device: torch.device, is_recorded: bool = True) -> float:
        asked.append(is_recorded)
        if is_recorded:
            raise RuntimeError("called a synchronizing CUDA operation")
        work()
        return 2.0

    monkeypatch.setattr(gpu_steps, "measure_ms", measure)
    tried = GpuEngine(plan, CPU, programs=programs)
    program = next(part for part in tried.parts if isinstance(part, TorchPart))
    tensors = tried._run(images(2), None)
    assert gpu_steps.time_part(program, CPU, tensors) == 2.0
    assert asked == [True, False]
    ours = next(part for part in tried.parts if isinstance(part, gpu_steps.StepPart))
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_steps.time_part(ours, CPU, tensors)


@pytest.mark.parametrize("error", [OutOfResources(400_000, 232_448, "shared memory"), PTXASError("")])
def test_a_kernel_that_does_not_compile_is_refused_and_others_are_chosen(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = prune(build("vgg"), "channel").eval()

    def fail(weights: LayerWeights) -> Callable[..., Tensor]:
        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            raise error

        return run

    monkeypatch.setitem(KERNELS, "compact", replace(KERNELS["compact"], make=fail))  # type: ignore[arg-type]
    plan, programs = plan_of(network, images(2))
    engine = choose_kernels(plan, programs, CPU, images(2))
    assert set(engine.kernels) == {"", "dense"}
    reasons = [row["reason"] for row in engine.explain(quiet=True).rows() if row["kernel"] == "dense"]
    assert any(f"compact: it stopped: {error}" in reason for reason in reasons)


def test_images_elsewhere_and_threads_of_a_gpu_are_refused(tmp_path: Path) -> None:
    network = build("vgg")
    engine = compile(copy.deepcopy(network), images(2), dtype="float32")
    with pytest.raises(TypeError, match="expected a tensor on the CPU, got one on meta"):
        engine(images(2).to("meta"))
    with pytest.raises(ValueError, match="expected example_input on the CPU or a GPU, got meta"):
        compile(network, images(2).to("meta"))
    engine.save(tmp_path / "engine")
    with pytest.raises(ValueError, match="expected no threads and at least 1 image on meta, got 2 and 32"):
        load(tmp_path / "engine", threads=2, device="meta")
    with pytest.raises(ValueError, match="expected no threads and at least 1 image on meta, got None and 0"):
        load(tmp_path / "engine", device="meta", images=0)


def test_an_opened_engine_is_timed_with_as_many_images_as_it_will_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(build("vgg"), images(2), dtype="float32").save(tmp_path / "engine")
    asked: list[Any] = []
    module = sys.modules["vpns_kernels.engine.load"]
    monkeypatch.setattr(module, "open_on_device", lambda *given: asked.append(given[-2:]))
    load(tmp_path / "engine", device="meta", images=4)
    assert asked == [(torch.device("meta"), 4)]
