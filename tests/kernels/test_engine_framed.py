"""Do a prompt and a normalisation become part of the first convolution, and is a frame never computed?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.test_engine import assert_close
from vpns_kernels import native
from vpns_kernels.engine import Engine
from vpns_kernels.engine.drafts import Lowered
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network


class Framed(nn.Module):
    """Images in a learned frame, normalised, and a small network."""

    def __init__(self, frame: int, conv: nn.Module, size: int = 12) -> None:
        super().__init__()
        self.frame, self.raw = frame, nn.Parameter(torch.randn(3, size + 2 * frame, size + 2 * frame))
        mask = torch.ones_like(self.raw)
        mask[:, frame:-frame, frame:-frame] = 0
        self.register_buffer("mask", mask if frame else torch.zeros_like(mask))
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1))
        self.rest = nn.Sequential(
            conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        canvas = F.pad(x, (self.frame,) * 4) + self.raw.sigmoid() * self.mask
        return self.rest((canvas - self.mean) / self.std)


class Clamped(Framed):
    """A prompt over the image's rim, clamped: not linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(((x + self.raw * self.mask).clamp(0, 1) - self.mean) / self.std)


CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "7x7/2": lambda: nn.Conv2d(3, 8, 7, 2, 3, bias=False),
    "dilated": lambda: nn.Conv2d(3, 8, 3, padding=2, dilation=2),
    "patches": lambda: nn.Conv2d(3, 8, 4, 4),
    "strides beyond the window": lambda: nn.Conv2d(3, 8, 2, 3),
}


def build(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network.eval()


@pytest.fixture(params=["avx2", ""])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.library().isa_cap(request.param)
    yield request.param
    native.library().isa_cap("")


def steps_of(network: nn.Module) -> Lowered:
    return lower(trace_network(network, torch.zeros(2, 3, 12, 12)))


@pytest.mark.parametrize("frame", [0, 1, 5])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_framed_prompt_is_part_of_the_first_convolution(kind: str, frame: int, isa: str) -> None:
    torch.manual_seed(3)
    network = build(Framed(frame, CONVOLUTIONS[kind]()))
    steps = steps_of(network)
    assert [step.op for step in steps.steps] == ["conv2d", "adaptive_avg_pool", "conv2d"]
    x = torch.rand(5, 3, 12, 12)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(Engine(draft_plan(steps, dtype, {}, chunk=2)), network, x, dtype)


def test_what_sees_the_frame_alone_is_the_same_for_all_images_even_for_nan() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    framed = build(Framed(4, conv))
    framed.rest = framed.rest[:3].eval()
    steps = steps_of(framed)
    y = Engine(draft_plan(steps, torch.float32, {}))(torch.full((2, 3, 12, 12), float("nan")))
    assert y.shape == (2, 8, 20, 20)
    seen = torch.zeros(20, 20, dtype=torch.bool)
    seen[3:17, 3:17] = True
    assert torch.equal(torch.isnan(y), seen.expand_as(y))


def test_a_prompt_that_is_clamped_is_left_to_torch_and_named() -> None:
    torch.manual_seed(3)
    network = build(Clamped(2, CONVOLUTIONS["3x3"](), size=8))
    steps = steps_of(network)
    (program,) = steps.programs
    assert "aten.clamp.default" in program.note
    assert_close(
        Engine(draft_plan(steps, torch.float32, {}), programs=steps.programs),
        network,
        torch.rand(3, 3, 12, 12),
        torch.float32,
    )
