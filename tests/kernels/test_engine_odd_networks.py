"""Do networks that do something unusual compile to the right answer, or stop with one clear reason?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.engine import compile

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="needs the compiled library")


class Odd(nn.Module):
    """Convolutions, constants of several kinds, and a forward that is given."""

    def __init__(self, compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.narrow, self.first, self.last = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.spectrum = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64))
        self.pairs = nn.Parameter(torch.randn(4, 1, 1, 2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4, 1, 1))
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def filter_spectrum(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.first(torch.fft.irfft2(torch.fft.rfft2(x) * m.spectrum))
    return y


def count_calls(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    y: Tensor = m.first(x)
    return y


def remember(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    m.seen["first"] = [y]
    return F.relu(y)


COMPUTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a complex weight": filter_spectrum,
    "a real activation times complex numbers": lambda m, x: m.last(
        (m.first(x) * torch.view_as_complex(m.pairs)).abs()
    ),
    "one channel times eight": lambda m, x: F.relu(m.narrow(x) * m.gain),
    "one channel and eight": lambda m, x: F.relu(m.narrow(x) + m.gain),
    "eight less one channel": lambda m, x: m.gain - m.narrow(x),
    "a channel of the images times eight": lambda m, x: x[:, :1] * m.gain,
    "writes over its input": lambda m, x: m.first(x.relu_()),
    "counts its calls": count_calls,
    "keeps what it saw": remember,
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPUTED)
def test_it_computes_what_the_network_does(name: str, dtype: Any) -> None:
    network, x = Odd(COMPUTED[name]).eval(), torch.randn(2, 3, 8, 8)
    with torch.enable_grad():
        network(x.clone())
    engine, given = compile(network, x, dtype=dtype), x.clone()
    y, expected = engine(given), network(x.clone())
    assert torch.equal(given, x)
    assert (y - expected).abs().max() / expected.abs().max() < (1e-5 if dtype == "float32" else 2e-2)


def average_calls(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.first(x)
    m.average.mul_(0.9).add_(0.1 * y.mean((0, 2, 3))[:, None, None])
    return y - m.average


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a dict": (lambda m, x: {"out": m.first(x)}, r"one tensor, got dict with keys \['out'\]"),
    "a list": (lambda m, x: [m.first(x)], "one tensor, got list of 1"),
    "two": (lambda m, x: (m.first(x), m.last(m.first(x))), "one tensor, got tuple of 2"),
    "nothing": (lambda m, x: None, "one tensor, got None"),
    "what it was given": (lambda m, x: x, "computes something, got its input back"),
    "what calls before have left": (average_calls, "writes over its buffer 'average' and reads it"),
    "as many as there are": (lambda m, x: m.first(x).view(len(x), -1), r"x\.shape\[0\] stays open"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_can_return_is_refused_in_words(name: str) -> None:
    compute, reason = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=f"compile: expected .*{reason}"):
        compile(Odd(compute).eval(), torch.randn(2, 3, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compile", "parallel"]
)
def test_what_wraps_a_network_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(compile(wrap(network).eval(), x, "float32")(x), compile(network, x, "float32")(x))


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    network, x = nn.Conv2d(3, 8, 3).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TypeError, match="expected a module, got function"):
        compile(lambda x: x, x)  # type: ignore[arg-type]
    for threads, error, got in (("2", TypeError, "'2'"), (1.5, TypeError, "1.5"), (0, ValueError, "0")):
        with pytest.raises(error, match=f"compile: expected .*thread.*, got {got}"):
            compile(network, x, threads=threads)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("name", ["one channel times eight", "counts its calls"])
def test_an_engine_can_be_copied_and_pickled(name: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    engine = compile(Odd(COMPUTED[name]).eval(), x)
    for twin in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(twin(x), engine(x))
        assert str(twin.explain(quiet=True)) == str(engine.explain(quiet=True))


@torch.no_grad()
def test_what_was_pruned_is_named_whichever_way_a_layer_runs() -> None:
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 1)).eval()
    weight = network[0].weight
    weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.9)
    kept = float((weight != 0).float().mean())
    first, second = compile(network, torch.randn(1, 64, 12, 12)).explain(quiet=True).rows()
    assert (first["pattern"], first["density"]) == ("unstructured", pytest.approx(kept))
    assert (second["pattern"], second["density"]) == ("", 1.0)
