"""Does a compiled network give what torch gives, for every batch, number of threads and instruction set?"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels import networks
from vpns_kernels import compile, native, parse_pattern
from vpns_kernels.convert import freeze, mask_layers, mask_modules, sparsify, weight_masks
from vpns_kernels.engine import Engine, TraceError, load
from vpns_kernels.engine.drafts import Lowered
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import detect_pattern, draft_plan
from vpns_kernels.engine.trace import trace_network

PATTERNS = ("unstructured", "block:4x2", "block:16x16", "channel")


def build(name: str) -> nn.Module:
    return networks.build(name).float().eval()


def images(count: int) -> Tensor:
    return networks.images(count).float()


def prune(network: nn.Module, spec: str, density: float = 0.5) -> nn.Module:
    """A plain network with zeros where units of the pattern are dropped."""
    generator = torch.Generator().manual_seed(13)
    masked = mask_layers(network, parse_pattern(spec)).eval()
    with torch.no_grad():
        for module in mask_modules(masked).values():
            module.mask.copy_(torch.rand(module.mask.shape, generator=generator) < density)
    return freeze(masked)


def assert_close(engine: Engine, network: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Within twice the error of torch's own network of that type, and some roundings of the largest."""
    with torch.no_grad():
        truth = copy.deepcopy(network).double()(x.double())
        theirs = copy.deepcopy(network).to(dtype)(x.to(dtype)).double()
    bound = 2 * (theirs - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    y = engine(x)
    assert (y.dtype, y.shape) == (torch.float32, truth.shape)
    assert float((y.double() - truth).abs().max()) <= float(bound)


@pytest.fixture(params=["avx2", ""])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The weakest instruction set that the runtime needs, and the strongest that is here."""
    native.library().isa_cap(request.param)
    yield request.param
    native.library().isa_cap("")


@functools.cache
def lowered(name: str, spec: str) -> tuple[nn.Module, Lowered]:
    """A pruned network, and its steps: tracing takes most of a test's time."""
    network = build(name)
    try:
        network = prune(network, spec)
    except NotImplementedError:
        # The channel pattern refuses groups; such a network runs whole.
        assert spec == "channel"
    return network.eval(), lower(trace_network(network.eval(), images(2)))


@pytest.mark.parametrize("spec", PATTERNS)
@pytest.mark.parametrize("name", networks.ALL)
def test_a_network_gives_what_it_gives_in_torch(name: str, spec: str, isa: str) -> None:
    network, steps = lowered(name, spec)
    names = [step.name for step in draft_plan(steps, torch.float32, {}).steps]
    for dtype in (torch.float32, torch.bfloat16):
        for is_sparse in (True, False):
            plan = draft_plan(steps, dtype, dict.fromkeys(names, is_sparse), chunk=2)
            assert_close(Engine(plan), network, images(5), dtype)


@pytest.mark.parametrize("spec", ["unstructured", "block:4x2"])
def test_outputs_do_not_depend_on_batch_threads_or_chance(spec: str) -> None:
    network, x = prune(build("residual"), spec).eval(), images(37)
    before = torch.get_num_threads()
    engine = compile(network, x[:8])
    expected = engine(x)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(engine(x), expected)
            assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), expected)
    finally:
        torch.set_num_threads(before)
    for count in (0, 1, 2, 3, 5, 19, 36):
        pieces = engine(x[:count])
        assert pieces.shape == (count, 5)
        # Another number of images may be summed in another order, by no more than rounding.
        torch.testing.assert_close(pieces, expected[:count], rtol=0.02, atol=0.02)
    for _ in range(50):
        assert torch.equal(engine(x), expected)


def test_callers_do_not_disturb_one_another() -> None:
    network = prune(build("residual"), "unstructured").eval()
    engine, batches = compile(network, images(4), threads=1), [images(n) for n in (1, 2, 5, 8)]
    expected = [engine(x) for x in batches]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(30):
            if not torch.equal(engine(batches[number]), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number % 4,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_images_of_any_type_and_layout_are_taken(dtype: torch.dtype) -> None:
    network, x = build("vgg"), images(4)
    engine = compile(network, x, "float32")
    given = x.to(dtype)
    expected = engine(given.float())
    assert torch.equal(engine(given), expected)
    assert torch.equal(engine(given.contiguous(memory_format=torch.channels_last)), expected)
    wide = torch.zeros(8, *x.shape[1:], dtype=dtype)
    wide[::2] = given
    assert torch.equal(engine(wide[::2]), expected)


def test_what_was_pruned_does_not_read_its_inputs() -> None:
    """A pruned channel's NaN goes nowhere, where the sparse kernel runs; elsewhere as in a dense layer."""
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).eval()
    with torch.no_grad():
        conv.weight[:, 16:32] = 0
    x = torch.randn(2, 64, 8, 8)
    engine = compile(conv, x, "float32")
    assert [report.is_sparse for report in engine.explain(quiet=True).steps] == [True]
    poisoned = x.clone()
    poisoned[:, 16:32] = float("nan")
    assert torch.equal(engine(poisoned), engine(x))
    poisoned[:, 40, 3, 3] = float("nan")
    with torch.no_grad():
        expected = conv(
            torch.where(torch.isnan(poisoned) & (torch.arange(64) < 32).view(64, 1, 1), 0, poisoned)
        )
    assert torch.equal(torch.isnan(engine(poisoned)), torch.isnan(expected))


@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_of_a_window_is_torchs_to_the_bit(dtype: str, channels: int) -> None:
    """NaN of either sign is above infinity; a padded window with -inf alone gives -inf."""
    x = torch.randn(2, channels, 13, 11)
    x[:, ::2, 3, 4], x[:, 1::2, 8, 2] = float("nan"), torch.tensor(-1.0).log()
    x[:, 1::3, 5:9, 5:9], x[:, 2, 0], x[:, 3, :4, :4] = float("inf"), 0.0, float("-inf")
    assert torch.isnan(x).any()
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((5, 3), (1, 4))):
        x_as = x.to(getattr(torch, dtype))
        y = compile(pool.eval(), x, dtype)(x_as)  # type: ignore[arg-type]
        torch.testing.assert_close(y, pool(x_as).float(), rtol=0, atol=0, equal_nan=True)


def test_networks_that_are_masked_or_sparse_compile_by_their_masks() -> None:
    masked = mask_layers(build("residual"), parse_pattern("block:4x2")).eval()
    with torch.no_grad():
        for module in mask_modules(masked).values():
            module.mask.copy_(torch.rand(module.mask.shape) < 0.4)
    x = images(2)
    plain = freeze(masked)
    sparse = sparsify(plain, weight_masks(masked), parse_pattern("block:4x2")).eval()
    expected = compile(plain, x, "float32")(x)
    for network in (masked, sparse):
        torch.testing.assert_close(compile(network, x, "float32")(x), expected)


def test_dense_is_chosen_where_nothing_is_pruned_and_the_report_says_so() -> None:
    report = compile(build("vgg"), images(1)).explain(quiet=True)
    assert report.sparse_flops_share == 0
    rows = {row["name"]: row for row in report.rows()}
    for row in rows.values():
        wanted = f"nothing is pruned: dense, natively by {row['kernel']}" if row["kernel"] else "no weights"
        assert row["reason"] == wanted
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert "nothing is pruned" in str(report)


def test_what_was_chosen_is_told_where_both_forms_took_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    with torch.no_grad():
        network[0].weight[:, 4:] = 0
    monkeypatch.setattr(Engine, "profile", lambda self, x: [1e-3] * len(self.plan.steps))
    engine = compile(network, torch.randn(2, 16, 8, 8), "float32")
    (report,) = engine.reports
    assert report.ms == report.sparse_ms == report.dense_ms
    assert not report.is_sparse
    assert "dense is faster here" in report.reason
    assert engine.explain(quiet=True).sparse_flops_share == 0
    engine.save(tmp_path / "engine")
    assert load(tmp_path / "engine").reports == engine.reports


def test_a_zero_by_chance_is_no_pruned_weight() -> None:
    network = build("vgg")
    with torch.no_grad():
        network[8].weight[3, 2] = 0
    steps = lower(trace_network(network, images(2)))
    assert all(bool(step.kept.all()) for step in steps.steps if step.kept is not None)
    assert_close(Engine(draft_plan(steps, torch.float32, {})), network, images(3), torch.float32)


def test_a_report_tells_of_each_layer_why(capsys: pytest.CaptureFixture[str]) -> None:
    network = prune(build("residual"), "unstructured", 0.1).eval()
    engine = compile(network, images(4))
    report = engine.explain()
    assert capsys.readouterr().out == f"{report}\n"
    for row, kernel in zip(report.rows(), engine.kernels, strict=True):
        if row["sparse_ms"] is None:
            continue
        assert row["is_sparse"] == (row["sparse_ms"] < row["dense_ms"])
        assert row["kernel"] == kernel
        assert ("dense is faster" in row["reason"]) != row["is_sparse"]
    ran = [row["is_sparse"] for row in report.rows()]
    assert (report.sparse_flops_share > 0) == any(ran)


@pytest.mark.parametrize(
    ("spec", "shape", "groups"),
    [
        ("block:32x32", (96, 64, 3, 3), 1),
        ("block:16x16", (48, 80, 1, 1), 1),
        ("block:8x8", (32, 32, 3, 3), 1),
        ("unstructured", (32, 32, 3, 3), 1),
        ("channel", (32, 20, 3, 3), 1),
        ("block:16x16", (64, 16, 3, 3), 4),
    ],
)
def test_the_pattern_of_a_mask_is_found(spec: str, shape: tuple[int, ...], groups: int) -> None:
    generator = torch.Generator().manual_seed(3)
    pattern = parse_pattern(spec)
    if spec == "channel":
        rows, columns = torch.rand(shape[0], generator=generator) < 0.5, torch.rand(shape[1]) < 0.7
        kept = (rows[:, None] & columns)[:, :, None, None].expand(shape)
    else:
        units = torch.rand(pattern.units_shape(shape), generator=generator) < 0.4
        kept = pattern.expand(units, shape)
    found = detect_pattern(kept, groups)
    assert found is not None
    assert found.spec == spec
    assert detect_pattern(torch.ones(shape, dtype=torch.bool), groups) is None


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class TwoResults(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(x), x.mean((2, 3))


def test_what_cannot_be_compiled_is_refused_by_name() -> None:
    x = images(1)
    with pytest.raises(TraceError, match=r"follow, got at '1\.0' \(Branching, test_engine\.py:\d+\): Could"):
        compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Branching())).eval(), x)
    with pytest.raises(TraceError, match="returns one tensor, got tuple of 2"):
        compile(TwoResults().eval(), x)
    with pytest.raises(ValueError, match="evaluation mode, got the network itself in training mode"):
        compile(build("vgg").train(), x)
    with pytest.raises(TypeError, match="expected a tensor as example_input, got list"):
        compile(build("vgg"), [1])  # type: ignore[arg-type]
    for wrong in (x[0], x.int(), x[:0]):
        with pytest.raises(ValueError, match="expected a floating example_input"):
            compile(build("vgg"), wrong)
    with pytest.raises(ValueError, match="expected dtype 'auto', 'float32' or 'bfloat16', got 'int8'"):
        compile(build("vgg"), x, "int8")  # type: ignore[arg-type]


def test_wrong_input_is_refused() -> None:
    x = images(2)
    engine = compile(build("vgg"), x)
    for wrong in (x[:, :2], x[:, :, 1:], x[0], F.pad(x, (1, 1))):
        with pytest.raises(ValueError, match=r"expected x \[N, 3, "):
            engine(wrong)
    for wrong in (x.double(), x.int(), [1]):
        with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got"):
            engine(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on the CPU, got one on meta"):
        engine(x.to("meta"))
