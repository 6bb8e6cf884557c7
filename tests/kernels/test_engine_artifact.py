"""Is a stored engine the engine that was stored, and does nothing else become one?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.test_engine import build, images, prune
from vpns_kernels import compile, load, native
from vpns_kernels.engine import ArtifactError, Engine, read_artifact, write_artifact
from vpns_kernels.engine.plan_file import decode_plan, encode_plan


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile(prune(build("residual"), "block:4x2", 0.4).eval(), images(4))


def test_a_stored_engine_gives_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "engine")
    opened = load(tmp_path / "engine")
    assert torch.equal(opened(images(7)), engine(images(7)))
    assert (opened.kernels, opened.reports) == (engine.kernels, engine.reports)
    assert [step.kernel for step in opened.plan.steps] == engine.kernels
    assert str(opened.explain(quiet=True)) == str(engine.explain(quiet=True))
    engine.save(tmp_path / "engine")
    assert torch.equal(load(tmp_path / "engine", threads=1)(images(2)), engine(images(2)))


def test_a_plan_is_decoded_as_it_was_encoded(engine: Engine, tmp_path: Path) -> None:
    data = torch.frombuffer(bytearray(b"".join(encode_plan(engine.plan))), dtype=torch.uint8)
    plan = decode_plan(data, tmp_path)
    assert b"".join(encode_plan(plan)) == data.numpy().tobytes()
    assert (plan.values, plan.input, plan.output, plan.chunk, plan.is_flat) == (
        engine.plan.values, engine.plan.input, engine.plan.output, engine.plan.chunk, True,
    )  # fmt: skip


def test_a_bare_plan_has_nothing_to_explain(engine: Engine) -> None:
    with pytest.raises(ValueError, match="expected an engine that compile has measured"):
        Engine(engine.plan).explain()


def test_layers_without_a_network_are_refused(engine: Engine, tmp_path: Path) -> None:
    write_artifact(tmp_path / "layers", {}, engine.plan.layers, {})
    with pytest.raises(ArtifactError, match=r"expected a compiled network in .* got its layers alone"):
        load(tmp_path / "layers")


def test_another_artifact_with_a_network_is_refused_without_its_reports(
    engine: Engine, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "foreign", {}, engine.plan, {})
    with pytest.raises(ArtifactError, match="expected an engine in"):
        load(tmp_path / "foreign")


def test_on_a_weaker_machine_other_kernels_run_it_and_the_report_says_so(
    engine: Engine, tmp_path: Path
) -> None:
    engine.save(tmp_path / "engine")
    if not any("avx512" in kernel for kernel in engine.kernels):
        pytest.skip("no AVX-512 here")
    native.library().isa_cap("avx2")
    try:
        weaker = load(tmp_path / "engine")
        assert not any("avx512" in kernel for kernel in weaker.kernels)
        assert "which this CPU lacks" in str(weaker.explain(quiet=True))
        torch.testing.assert_close(weaker(images(3)), engine(images(3)), rtol=0.05, atol=0.05)
    finally:
        native.library().isa_cap("")


def test_what_stands_there_is_not_overwritten_by_an_engine(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="expected no folder or an artifact"):
        engine.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_the_artifact_lists_what_it_is(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "engine")
    artifact = read_artifact(tmp_path / "engine", verify="all")
    assert artifact.manifest["kind"] == "engine"
    assert [layer.name for layer in artifact.layers] == [
        s.name for s in engine.plan.steps if s.layer is not None
    ]
