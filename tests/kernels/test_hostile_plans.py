"""Does C++ refuse a plan that lies, or run it within its bounds? Nobody has hashed what it reads."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.test_engine import build, images, prune
from tests.kernels.test_engine_torch import Attentive
from vpns_kernels import native
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.plan_file import decode_plan, encode_plan
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.strips import find_strips
from vpns_kernels.engine.trace import trace_network

# Of networks that are run: then no step goes beyond what is allocated here.
MOST_BYTES = 1 << 20
X, Y = torch.zeros(MOST_BYTES), torch.zeros(MOST_BYTES)


class Steps(nn.Module):
    """Every step without weights, and a prompt in a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(6, 4)
        self.register_buffer("frame", torch.randn(3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(F.pad(x, (2,) * 4) + self.frame))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        first, second = x.chunk(2, 1)
        x = torch.cat([F.max_pool2d(second, 3, 1, 1), first], 1)
        x = x.view(-1, 2, 4, 12, 12).transpose(1, 2).reshape(-1, 8, 12, 12)
        return self.head(F.avg_pool2d(x[:, 1:7] + x[:, 2:], 12).flatten(1))


def make(kind: str) -> tuple[bytes, int]:
    """A good plan, and in how many segments it runs; -1: whole."""
    torch.manual_seed(3)
    if kind == "segments":
        network: nn.Module = Attentive()
    else:
        name, spec = ("residual", "block:4x2") if kind == "strips" else (kind, "unstructured")
        network = Steps() if kind == "steps" else prune(build(name), spec, 0.4)
    plan = draft_plan(lower(trace_network(network.eval(), images(1))), torch.float32, {})
    if kind == "strips":
        plan = replace(plan, strips=find_strips(plan)[0])
        assert plan.strips
    natives = [step.native for step in plan.steps]
    segments = sum(now and not before for before, now in zip([False, *natives], natives, strict=False))
    return b"".join(encode_plan(plan)), -1 if plan.native else segments


def open_natively(data: bytes, segment: int) -> None:
    """What a C++ program does with a plan, and one image through it."""
    plan = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()
    network = native.library().Network(plan.data_ptr(), plan.numel(), segment)
    if network.bytes_per_image < MOST_BYTES:
        x, y = ((tensor.data_ptr(), "float32", [0, 1, 1, 1]) for tensor in (X, Y))
        ends = [x] * len(network.inputs), [y] * len(network.outputs)
        network.run(native.library().ExecutionContext(), *ends, 1, 1)


def change(good: bytes, number: int, chance: random.Random) -> bytes:
    """Bits, numbers and lengths, most of them in the tables."""
    tables = struct.unpack_from("<Q", good, 56)[0]
    data = bytearray(good)
    place = chance.randrange(tables // 4) * 4 if number % 4 else chance.randrange(len(data) // 4) * 4
    old = struct.unpack_from("<I", data, place)[0]
    others = (old ^ 1 << chance.randrange(32), chance.randrange(1 << 32), chance.randrange(16), old + 1)
    struct.pack_into("<I", data, place, chance.choice(others) % (1 << 32))
    return bytes(data[: chance.randrange(len(data))]) if number % 10 == 0 else bytes(data)


def attack(kind: str, count: int, seed: int) -> None:
    good, segments = make(kind)
    wanted = [-1] if segments < 0 else list(range(segments))
    for segment in wanted:
        open_natively(good, segment)
    chance, refused = random.Random(seed), 0
    for number in range(count):
        data = change(good, number, chance)
        try:
            open_natively(data, wanted[number % len(wanted)])
        except (ValueError, MemoryError):
            refused += 1
    assert count // 4 < refused < count


@pytest.mark.parametrize("kind", ["residual", "vgg", "depthwise", "steps", "segments", "strips"])
def test_a_hostile_plan_is_refused_or_valid_and_never_crashes(kind: str) -> None:
    attack(kind, 400, 5)


@pytest.mark.parametrize(
    ("version", "hint"), [(2, "older: compile and save it again"), (1 << 31, "newer than this reader")]
)
def test_a_plan_of_another_version_is_refused_in_the_words_of_the_python_reader(
    version: int, hint: str
) -> None:
    good, segment = make("vgg")
    data = good[:8] + struct.pack("<I", version) + good[12:]
    message = rf"expected version \d+, got {version} \({hint}\)$"
    with pytest.raises(ValueError, match=message):
        open_natively(data, segment)
    with pytest.raises(ValueError, match=message):
        decode_plan(torch.frombuffer(bytearray(data), dtype=torch.uint8), Path("plan.bin"))


def test_the_largest_size_that_python_writes_is_read() -> None:
    network = nn.Conv2d(3, 4, 1, stride=2**31 - 1).eval()
    plan = draft_plan(lower(trace_network(network, images(1))), torch.float32, {})
    open_natively(b"".join(encode_plan(plan)), -1)


@pytest.mark.long
@pytest.mark.parametrize("seed", [6, 7])
@pytest.mark.parametrize("kind", ["residual", "vgg", "depthwise", "steps", "segments", "strips"])
def test_10000_more_hostile_plans_never_crash(kind: str, seed: int) -> None:
    attack(kind, 1000, seed)
