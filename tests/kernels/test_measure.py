"""Measuring: order of the rounds, figures from a fake clock, intervals, the lock, opponents, provenance."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.measure import (
    OPPONENTS,
    Laps,
    Opponent,
    Sample,
    add_up,
    compare,
    find_opponents,
    fingerprint,
    interleave,
    interleave_phases,
    measurement_lock,
)
from vpns_kernels.measure.fingerprint import source_state
from vpns_kernels.measure.layer_bench import measure_ceilings


class FakeClock:
    """A clock that stands still but for what callables spend."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_callables_take_turns_and_warm_up_untimed() -> None:
    clock, order = FakeClock(), []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = interleave(calls, rounds=3, warmup=1, clock=clock)
    assert "".join(order) == "abababab"
    assert [len(samples[name].times_ms) for name in "ab"] == [3, 3]


def test_times_are_those_of_each_callable_in_the_order_of_the_rounds() -> None:
    clock = FakeClock()
    calls = {"a": clock.spend(9.0, 0.001, 0.003, 0.002), "b": clock.spend(0.5)}
    samples = interleave(calls, rounds=3, warmup=1, clock=clock)
    assert samples["a"].times_ms == pytest.approx((1, 3, 2))
    assert samples["b"].times_ms == pytest.approx((500, 500, 500))
    assert samples["a"].to_dict() == pytest.approx(
        {"median_ms": 2, "p20_ms": 1.4, "p80_ms": 2.6, "rounds": 3}
    )


@pytest.mark.parametrize(("calls", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(calls: dict[str, Callable[[], object]], rounds: int) -> None:
    with pytest.raises(ValueError, match="expected callables and at least 1 round"):
        interleave(calls, rounds)


def test_phases_hold_what_passed_between_marks_and_add_up_to_the_rest_of_the_call() -> None:
    clock = FakeClock()
    spend = {"forward": clock.spend(9.0, 1.0, 2.0), "backward": clock.spend(9.0, 4.0, 8.0)}

    def step(laps: Laps) -> None:
        clock.spend(100.0)()  # getting ready
        laps.skip()
        for phase in ("forward", "backward", "forward"):
            spend[phase]()
            laps.mark(phase)

    found = interleave_phases({"step": step}, rounds=2, clock=clock)["step"]
    # The warm-up takes the first two entries of the forward, which runs twice.
    assert found["forward"].times_ms == (4000, 4000)
    assert found["backward"].times_ms == (4000, 8000)
    assert add_up(found).times_ms == (8000, 12000)


def test_an_error_of_a_callable_is_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("out of tiles")

    with pytest.raises(RuntimeError, match="out of tiles"):
        interleave({"a": fail}, rounds=1)


def test_ratios_are_taken_round_by_round() -> None:
    # A machine that slows down tenfold half way changes both medians, but no ratio.
    fast = [1.0] * 10 + [10.0] * 10
    ratio = compare(Sample(tuple(2 * t for t in fast)), Sample(tuple(fast)))
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)


def test_comparing_the_other_way_round_gives_the_inverse() -> None:
    rng = random.Random(0)
    a, b = (Sample(tuple(rng.lognormvariate(0, 0.2) for _ in range(31))) for _ in range(2))
    forth, back = compare(a, b), compare(b, a)
    assert (forth.median, forth.low, forth.high) == pytest.approx(
        (1 / back.median, 1 / back.high, 1 / back.low)
    )


@pytest.mark.parametrize("count", [6, 7, 15, 30, 31, 100])
def test_the_interval_has_the_smallest_exact_coverage_of_at_least_95_percent(count: int) -> None:
    ratio = compare(Sample(tuple(range(1, count + 1))), Sample((1,) * count))
    cut = int(ratio.low) - 1
    assert ratio.high == count - cut
    assert coverage(count, cut) >= 0.95
    assert coverage(count, cut + 1) < 0.95


def coverage(count: int, cut: int) -> float:
    """Probability that the median lies between the values with `cut` others outside on either side."""
    outside: float = 2 * sum(math.comb(count, below) for below in range(cut + 1)) / 2**count
    return 1 - outside


def test_below_six_rounds_the_interval_is_all_that_was_seen() -> None:
    ratio = compare(Sample((3.0, 1.0, 2.0)), Sample((1.0, 1.0, 1.0)))
    assert (ratio.low, ratio.median, ratio.high) == (1, 2, 3)


def test_a_second_measurement_waits_for_the_first_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, events = tmp_path / "lock", []
    started = threading.Event()

    def second() -> None:
        started.set()
        with measurement_lock(lock):
            events.append("second")

    thread = threading.Thread(target=second)
    with measurement_lock(lock):
        thread.start()
        started.wait()
        thread.join(timeout=0.2)
        events.append("first")
    thread.join()
    assert events == ["first", "second"]
    assert "waiting for another measurement" in capsys.readouterr().err


def test_the_lock_falls_with_its_process_and_needs_no_right_to_write(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import os, sys; from pathlib import Path; from vpns_kernels.measure import measurement_lock\n"
        "measurement_lock(Path(sys.argv[1])).__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)], check=True)
    lock.chmod(0o444)
    with measurement_lock(lock):
        assert lock.exists()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5)
    )
    return layers.train()


def test_eager_opponents_run_a_copy_in_eval_mode_and_their_own_dtype() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find_opponents(model, x, ["torch float32", "torch bfloat16"])
    with torch.no_grad():
        expected = network().eval()(x)
    for name, dtype, bound in (
        ("torch float32", torch.float32, 1e-5),
        ("torch bfloat16", torch.bfloat16, 0.1),
    ):
        call = found[name].call
        assert call is not None
        y = call()
        assert y.dtype == dtype
        assert not y.requires_grad
        assert (y.float() - expected).abs().max() <= bound
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_opponents_get_their_input_and_answer_in_channels_last() -> None:
    found = find_opponents(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9), ["torch float32"])
    call = found["torch float32"].call
    assert call is not None
    assert call().is_contiguous(memory_format=torch.channels_last)


def test_linear_layers_have_opponents_too() -> None:
    call = find_opponents(nn.Linear(3, 4), torch.randn(2, 3), ["torch bfloat16"])["torch bfloat16"].call
    assert call is not None
    assert call().shape == (2, 4)


def test_an_unknown_opponent_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"expected names of \['torch float32'.*got \['tensorrt'\]"):
        find_opponents(nn.Linear(3, 4), torch.randn(2, 3), ["torch float32", "tensorrt"])


def test_an_engine_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: nn.Module, options: dict[str, bool]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no working C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    found = find_opponents(nn.Linear(3, 4), torch.randn(2, 3), ["torch.compile float32"])
    opponent = found["torch.compile float32"]
    assert opponent.call is None
    assert opponent.why_not is not None
    assert "no working C++ compiler" in opponent.why_not


def test_an_engine_that_answers_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Opponent("wrong float32", lambda: torch.zeros(2, 4))
    monkeypatch.setitem(OPPONENTS, "wrong float32", lambda name, subject: wrong)
    opponent = find_opponents(nn.Linear(3, 4), torch.randn(2, 3), ["wrong float32"])["wrong float32"]
    assert opponent.call is None
    assert opponent.why_not is not None
    assert "the largest is" in opponent.why_not
    assert "more than the 0.001 of rounding" in opponent.why_not


def test_a_layer_with_nothing_but_zeros_to_give_is_timed() -> None:
    conv = nn.Conv2d(3, 4, 1, bias=False)
    nn.init.zeros_(conv.weight)
    found = find_opponents(conv, torch.randn(1, 3, 4, 4), ["torch float32", "torch bfloat16"])
    assert all(opponent.call is not None for opponent in found.values())


PEERS = ["onnxruntime float32", "openvino float32", "openvino bfloat16", "openvino int8"]


def test_engines_that_are_not_installed_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpns_kernels.onnx_file.find_spec", lambda name: None)
    found = find_opponents(nn.Linear(3, 4), torch.randn(2, 3), [*PEERS, "deepsparse float32"])
    assert all(opponent.call is None for opponent in found.values())
    for name in PEERS:
        assert "onnx, onnxscript" in str(found[name].why_not)
        assert "pip install -c constraints.txt -e '.[peers]'" in str(found[name].why_not)
    assert "deepsparse==1.8.0" in str(found["deepsparse float32"].why_not)


@pytest.mark.parametrize("name", PEERS)
def test_engines_that_read_onnx_give_torchs_answer(name: str) -> None:
    pytest.importorskip("onnxscript", reason="the extra [peers] is not installed")
    pytest.importorskip(name.split()[0], reason="the extra [peers] is not installed")
    model = network().eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    opponent = find_opponents(model, x, [name])[name]
    if opponent.why_not is not None and "no bfloat16 on this CPU" in opponent.why_not:
        pytest.skip(opponent.why_not)
    assert opponent.call is not None, opponent.why_not
    with torch.no_grad():
        expected = model(x)
    bound = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.1}[name.split()[-1]]
    assert float((opponent.call() - expected).abs().max() / expected.abs().max()) <= bound


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_opponent_gives_the_eager_answer() -> None:
    x = torch.randn(2, 3, 9, 9)
    found = find_opponents(network(), x, ["torch.compile float32", "torch.compile bfloat16"])
    with torch.no_grad():
        expected = network().eval()(x)
    for opponent in found.values():
        assert opponent.call is not None, opponent.why_not
        assert (opponent.call().float() - expected).abs().max() <= 0.1


def test_the_fingerprint_names_machine_versions_and_date() -> None:
    found = fingerprint()
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"][:2] == "20"
    assert found["cores"] >= 1
    assert {"commit", "dirty", "isa", "python"} <= found.keys()


def test_commit_and_dirty_flag_belong_to_the_checkout_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert source_state(file) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    # A file that merely lies in a checkout is not of its commit.
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert source_state(file) == {"commit": None, "dirty": None}
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "second")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_state(file) == {"commit": commit, "dirty": False}
    file.write_text("a = 2\n")
    assert source_state(file) == {"commit": commit, "dirty": True}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_rate_of_multiplying_is_that_of_what_may_be_used() -> None:
    library = native.library()
    assert measure_ceilings()["float32"] > 1
    library.isa_cap("scalar")
    try:
        assert library.multiply_rate("float32", 1) == library.multiply_rate("bfloat16", 1) == 0.0
    finally:
        library.isa_cap("")
    # Which of the two is faster is the CPU's own: beside tiles, vectors multiply bfloat16 at half the rate.
    has_products = any(map(native.has_isa, ("avx512_bf16", "amx")))
    assert (library.multiply_rate("bfloat16", 1) > 1) is has_products


def test_ctrl_c_after_openvino_is_no_segmentation_fault() -> None:
    pytest.importorskip("openvino", reason="the extra [peers] is not installed")
    code = """
import gc, os, signal, torch
from vpns_kernels.measure import find_opponents

names = ("openvino float32", "openvino bfloat16", "openvino int8")
for found in find_opponents(torch.nn.Conv2d(3, 4, 3), torch.ones(2, 3, 8, 8), names).values():
    found.call is None or found.call()
del found
gc.collect()
signal.signal(signal.SIGINT, lambda number, frame: print("told"))
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
