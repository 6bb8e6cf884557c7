"""Does each step without weights give what torch gives: curves, gates, shuffles, pieces, constants?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.test_engine import assert_close, images
from vpns_kernels import native
from vpns_kernels.engine import Engine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.plan import CURVES
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network

CHANNELS = 45  # 32 + 8 + 5: every width of the loops


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, middle: Callable[[Tensor], Tensor], channels: int = CHANNELS) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, channels, 3, padding=1), middle
        width = middle(torch.zeros(2, channels, 8, 8)).shape[1]
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x) * 3))


def shuffled(groups: int) -> Callable[[Tensor], Tensor]:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return shuffle


def pieces(x: Tensor) -> Tensor:
    first, second, third = x.split([8, 20, 17], 1)
    return torch.cat([third, F.relu(first), second, x[:, 3:7], x[:, -2:]], 1)


VECTOR = torch.linspace(-1, 1, CHANNELS).view(1, -1, 1, 1)
MIDDLES: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "silu": (F.silu, set()),
    "hardswish": (F.hardswish, set()),
    "hardsigmoid": (F.hardsigmoid, set()),
    "sigmoid": (torch.sigmoid, set()),
    "gelu": (F.gelu, set()),
    "a curve of two readers": (lambda x: F.silu(x) + x, {"add"}),
    "a residual, then a curve": (lambda x: F.silu(F.max_pool2d(x, 3, 1, 1) + x), {"max_pool", "add"}),
    "gate by image": (lambda x: x * x.mean((2, 3), keepdim=True), {"adaptive_avg_pool", "gate"}),
    "gate by image, first": (lambda x: x.mean((2, 3), keepdim=True) * x, {"adaptive_avg_pool", "gate"}),
    "gate by pixel": (lambda x: F.relu(x) * F.max_pool2d(x, 3, 1, 1), {"add", "max_pool", "gate"}),
    "shuffle of 3": (shuffled(3), {"shuffle"}),
    "shuffle of 5": (shuffled(5), {"shuffle"}),
    "pieces": (pieces, {"copy", "add"}),
    "chunks": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), {"copy"}),
    "constants": (lambda x: (2 - F.max_pool2d(x, 2) * VECTOR.to(x)) / 3 + VECTOR.to(x), {"max_pool"}),
    "one channel": (lambda x: torch.cat([x[:, 5].unsqueeze(1) * 2 + 1, x], 1), {"copy"}),
}


@pytest.fixture(params=["avx2", ""])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.library().isa_cap(request.param)
    yield request.param
    native.library().isa_cap("")


def check(network: nn.Module, others: set[str]) -> None:
    steps = lower(trace_network(network.eval(), images(2)))
    assert not steps.programs
    assert {step.op for step in steps.steps} - {"conv2d", "linear"} == others
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(draft_plan(steps, dtype, {}, chunk=2))
        assert_close(engine, network, images(5), dtype)


@pytest.mark.parametrize("name", MIDDLES)
def test_a_step_gives_what_torch_gives(name: str, isa: str) -> None:
    torch.manual_seed(2)
    middle, others = MIDDLES[name]
    check(Between(middle), others)


def test_a_shuffle_of_two_groups_takes_an_even_number(isa: str) -> None:
    torch.manual_seed(2)
    check(Between(shuffled(2), 46), {"shuffle"})


class Chosen(nn.Module):
    """Some outputs of a head, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 10)
        self.register_buffer("wanted", torch.tensor([7, 0, 3, 7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)).index_select(1, self.wanted)


def test_outputs_that_nobody_wants_are_not_computed() -> None:
    torch.manual_seed(2)
    network = Chosen().eval()
    check(network, {"flatten"})
    (*_, head) = lower(trace_network(network, images(2))).steps
    assert head.geometry.out_channels == 4


@pytest.mark.parametrize("curve", CURVES)
def test_curves_hold_far_out_and_pass_nan_on(curve: str) -> None:
    called: Callable[[Tensor], Tensor] = getattr(F, curve) if hasattr(F, curve) else getattr(torch, curve)
    x = torch.cat([torch.linspace(-200, 200, 8191), torch.tensor([float("nan")])]).view(1, 1, 64, 128)
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), Applied(called)).eval()
    with torch.no_grad():
        network[0].weight.fill_(1)
    steps = lower(trace_network(network, x))
    y, expected = Engine(draft_plan(steps, torch.float32, {}))(x), called(x)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


class Applied(nn.Module):
    def __init__(self, called: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x)
