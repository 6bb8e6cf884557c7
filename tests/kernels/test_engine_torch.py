"""What no native step computes runs in torch, between native steps: is the whole right, stored, explained?"""

from __future__ import annotations

import itertools
import re
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.kernels.artifacts import resign
from tests.kernels.test_engine import assert_close, images
from vpns_kernels import compile, load, native
from vpns_kernels.engine import ArtifactError, Engine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.plan_file import encode_plan
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network

MODEL, MODEL_WEIGHTS = "archive/models/model.json", "archive/data/weights/model_weights_config.json"


class Attentive(nn.Module):
    """Tokens, softmax and a residual that passes torch by; some results only torch sees, some both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.mix = nn.LayerNorm(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.relu(self.stem(x))
        side = self.side(stem)
        tokens = self.norm(stem.flatten(2).transpose(1, 2))
        tokens = F.softplus(tokens).transpose(1, 2)
        whole = tokens.reshape(stem.shape)
        mixed = F.relu(self.mix(whole + stem) + side)
        weights = (mixed.flatten(2) * tokens).softmax(-1).amax(-1)
        return self.head(mixed.mean((2, 3)) * weights)


class OnlyTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1).relu()


class TorchFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.conv(torch.cumsum(x, 1)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(4)
    return Attentive().eval()


@pytest.fixture(scope="module")
def engine(network: nn.Module) -> Engine:
    return compile_in_part(network, images(4))


def compile_in_part(network: nn.Module, x: Tensor, dtype: str = "float32") -> Engine:
    """Compiled with native steps, be it that torch alone is faster on networks of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["vpns_kernels.engine.compile"], "CLEARLY", 0.0)
        return compile(network, x, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Attentive, OnlyTorch, TorchFirst])
def test_a_network_that_torch_runs_in_part_gives_what_torch_gives(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    whole = kind().eval()
    steps = lower(trace_network(whole, images(2)))
    engine = Engine(draft_plan(steps, dtype, {}, chunk=2), programs=steps.programs)
    assert not engine.plan.native
    for count in (1, 2, 5):
        assert_close(engine, whole, images(count), dtype)
    assert engine(images(0)).shape[0] == 0


def test_segments_are_few_and_each_layer_with_weights_is_native(engine: Engine) -> None:
    kinds = [step.native for step in engine.plan.steps]
    borders = sum(one != other for one, other in itertools.pairwise(kinds))
    assert borders == 4
    assert {step.name for step in engine.plan.steps if step.layer is not None} == {
        "stem",
        "side",
        "mix",
        "head",
    }


def test_the_report_says_what_torch_runs_and_why(engine: Engine) -> None:
    rows = [row for row in engine.explain(quiet=True).rows() if row["op"] == "torch"]
    assert rows[0]["kernel"] == "torch"
    assert "aten.layer_norm.default at 'norm': a native step has no such operation" in rows[0]["reason"]
    assert all(row["reason"].startswith("left to torch: aten.") for row in rows)


def test_a_stored_engine_of_both_gives_the_same_bits_for_any_batch(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "engine")
    files = sorted(path.name for path in (tmp_path / "engine").glob("torch-*"))
    assert files == [f"torch-{number}.pt2" for number in range(len(engine.programs))]
    opened = load(tmp_path / "engine")
    for count in (0, 1, 2, 7):
        assert torch.equal(opened(images(count)), engine(images(count)))
    assert str(opened.explain(quiet=True)) == str(engine.explain(quiet=True))


def test_a_stored_program_is_checked_before_it_is_opened(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    engine.save(folder)
    good = (folder / "torch-0.pt2").read_bytes()
    (folder / "torch-0.pt2").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"SHA-256 .* torch-0\.pt2|torch-0\.pt2, got"):
        load(folder)
    (folder / "torch-0.pt2").write_bytes(good[: len(good) // 2])
    resign(folder)
    with pytest.raises(ArtifactError, match="expected the program"):
        load(folder)
    (folder / "torch-0.pt2").write_bytes(good)
    resign(folder, lambda manifest: manifest["files"].pop("torch-1.pt2"))
    with pytest.raises(ArtifactError, match=r"expected torch-1\.pt2"):
        load(folder)
    resign(folder, lambda manifest: manifest["programs"].pop())
    with pytest.raises(ArtifactError, match="expected a program for torch"):
        load(folder)


HOSTILE = {
    "a pickle": ("archive/data/sample_inputs/model.pt", b"", b"\x80\x04.", "no sample inputs"),
    "another file": (
        "archive/data/constants/opaque_obj_0",
        b"",
        b"\x80\x04.",
        "files of an ordinary program",
    ),
    "a pickled weight": (MODEL_WEIGHTS, b'"use_pickle": false', b'"use_pickle": true', "got use_pickle"),
    "a function": (
        MODEL,
        b"torch.ops.aten.softplus.default",
        b"torch.hub.load",
        "got target 'torch.hub.load'",
    ),
    "an expression": (MODEL, b"Symbol('s", b"exec('s", "got expr_str"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_program_that_could_run_code_is_refused_under_right_digests(
    kind: str, engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    engine.save(folder)
    name, old, new, reason = HOSTILE[kind]
    with zipfile.ZipFile(folder / "torch-0.pt2") as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    assert old in files.get(name, b"")
    files[name] = files.get(name, b"").replace(old, new, 1) if old else new
    with zipfile.ZipFile(folder / "torch-0.pt2", "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    resign(folder)
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        load(folder)


def test_without_torch_such_a_plan_is_refused_by_name(engine: Engine) -> None:
    data = torch.frombuffer(bytearray(b"".join(encode_plan(engine.plan))), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"steps that run without torch, got layer torch:"):
        native.library().Network(data.data_ptr(), data.numel())
    with pytest.raises(ValueError, match="a segment that is there, got 9"):
        native.library().Network(data.data_ptr(), data.numel(), 9)


def test_callers_of_both_do_not_disturb_one_another(engine: Engine) -> None:
    batches = [images(count) for count in (1, 2, 5, 8)]
    expected = [engine(x) for x in batches]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(20):
            if not torch.equal(engine(batches[number]), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number % 4,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("kind", [Attentive, TorchFirst])
def test_in_bfloat16_torch_computes_its_share_in_it_too(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(4)
    whole = kind().eval()
    engine = compile_in_part(whole, images(4), "bfloat16")
    ports = [port for program in engine.programs for port in program.reads if port.value >= 0]
    assert {port.dtype for port in ports} == {"bfloat16"}
    assert_close(engine, whole, images(5), torch.bfloat16)
    engine.save(tmp_path / "engine")
    assert torch.equal(load(tmp_path / "engine")(images(3)), engine(images(3)))


class Singular(nn.Module):
    """What torch has in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.linalg.svdvals(self.conv(x).mean(1)))


def test_what_torch_has_in_float32_alone_stays_so_and_the_report_says_it() -> None:
    torch.manual_seed(4)
    whole = Singular().eval()
    engine = compile_in_part(whole, images(2), "bfloat16")
    with torch.no_grad():
        torch.testing.assert_close(engine(images(3)), whole(images(3)), rtol=0.05, atol=0.05)
    (row,) = [row for row in engine.explain(quiet=True).rows() if row["op"] == "torch"]
    assert "(in float32, as torch lacks some of it in bfloat16: " in row["reason"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_native_steps_do_not_pay_torch_runs_alone_and_the_report_says_so(
    network: nn.Module, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Whatever is measured, torch alone is fast enough.
    monkeypatch.setattr(sys.modules["vpns_kernels.engine.compile"], "CLEARLY", 1e9)
    alone = compile(network, images(2), dtype)  # type: ignore[arg-type]
    assert {step.op for step in alone.plan.steps} == {"torch"}
    assert_close(alone, network, images(3), getattr(torch, dtype))
    assert "left to torch: torch alone takes" in str(alone.explain(quiet=True))
    alone.save(tmp_path / "engine")
    assert torch.equal(load(tmp_path / "engine")(images(1)), alone(images(1)))


def test_networks_of_other_pruning_tools_are_read_through_their_masks() -> None:
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )
    prune.random_unstructured(network[0], "weight", 0.5)
    prune.ln_structured(network[2], "weight", 0.5, 2, dim=0)
    prune.l1_unstructured(network[2], "bias", 2)
    prune.global_unstructured([(network[4], "weight")], prune.L1Unstructured, amount=0.8)
    parametrize.register_parametrization(network[0], "bias", Doubled())
    network.eval()
    steps = lower(trace_network(network, images(2)))
    assert not steps.programs
    kept = {step.layer: float(step.kept.float().mean()) for step in steps.steps if step.kept is not None}
    assert kept == pytest.approx({"0": 0.5, "2": 0.5, "4": 0.2}, abs=0.01)
    # The network itself is as it was.
    assert len(network[0]._forward_pre_hooks) == 1
    for place, name in ((0, "weight"), (2, "weight"), (2, "bias"), (4, "weight")):
        prune.remove(network[place], name)
    assert_close(Engine(draft_plan(steps, torch.float32, {})), network, images(3), torch.float32)
