"""Do steps that take an image together, a strip of rows at a time, give the bits that they give alone?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels import networks
from tests.kernels.test_engine import build, isa, lowered, prune
from vpns_kernels import compile, load
from vpns_kernels.engine import Engine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.plan import Plan
from vpns_kernels.engine.plan_file import decode_plan, encode_plan
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.strips import choose_strips, find_strips, with_strips
from vpns_kernels.engine.trace import trace_network

__all__ = ["isa"]
# Of strips of one row, of some, and of whole images.
CACHES = (1, 6000, 1 << 24)


class Odd(nn.Module):
    """Over an odd number of pixels: strides, dilation, even filters, pools, depthwise, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, padding=2)
        self.widen, self.depthwise = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, 2, 1, groups=64)
        self.project, self.shortcut = nn.Conv2d(64, 32, 1), nn.Conv2d(32, 32, 1, 2)
        self.dilated, self.even = nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.Conv2d(32, 32, (2, 4))
        self.last = nn.Conv2d(64, 32, 3, (3, 1), (2, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.project(F.relu6(self.depthwise(F.relu6(self.widen(x))))) + self.shortcut(x)
        x = F.relu(self.dilated(x) + x)
        x = torch.cat([F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)], 1)
        x = F.silu(self.last(x))
        return self.even(F.pad(x, (0, 0)) if x.shape[2] < 2 else x).flatten(1)


def odd(kind: str, size: tuple[int, int] = (37, 27)) -> tuple[Plan, Tensor]:
    """A plan in which every layer but depthwise ones is pruned by blocks, and five images."""
    torch.manual_seed(5)
    x = torch.randn(5, 3, *size)
    network = prune(Odd().eval(), kind, 0.5).eval()
    return draft_plan(lower(trace_network(network, x[:2])), torch.float32, {}), x


def all_groups(plan: Plan) -> list[tuple[int, int]]:
    """Every run of at least two steps that run by rows, however they hang together."""
    groups: list[tuple[int, int]] = []
    first = 0
    for place in range(len(plan.steps) + 1):
        if place == len(plan.steps) or not plan.runs_by_rows(plan.steps[place]):
            groups += [(first, place - first)] * (place - first >= 2)
            first = place + 1
    return groups


def assert_same_bits(plan: Plan, x: Tensor, caches: tuple[int, ...] = CACHES) -> int:
    """By all groups, for every cache; how many groups ran by strips."""
    engine, ran = Engine(plan), 0
    groups = all_groups(plan)
    halves = [(first + count // 2, count - count // 2) for first, count in groups if count >= 4]
    for threads, chunk, images in ((1, 1, 1), (1, 3, 5), (2, 2, 5)):
        engine.threads = threads
        engine.set_chunk(chunk)
        engine.set_strips([])
        expected = engine(x[:images])
        for strips in (groups, halves):
            for cache in caches:
                engine.set_strips(strips, cache)
                ran += len(engine.strips)
                assert torch.equal(engine(x[:images]), expected)
                assert torch.equal(engine(x[:images]), expected)
    return ran


@pytest.mark.parametrize("name", networks.ALL)
def test_strips_change_no_bit_of_any_network(name: str, isa: str) -> None:
    steps = lowered(name, "block:4x2")[1]
    x = networks.images(5).float()
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(draft_plan(steps, dtype, {}), x)


@pytest.mark.parametrize("kind", ["block:16x16", "block:32x32"])
def test_strips_change_no_bit_of_odd_sizes(kind: str, isa: str) -> None:
    plan, x = odd(kind)
    assert assert_same_bits(plan, x) > 0


@pytest.mark.parametrize("kernel", ["block_amx_emulated", "block_avx512_bf16_emulated"])
def test_strips_change_no_bit_of_kernels_that_are_not_here(kernel: str) -> None:
    torch.manual_seed(5)
    x = torch.randn(5, 3, 21, 18)
    network = prune(Odd().eval(), "block:16x16", 0.5).eval()
    plan = draft_plan(lower(trace_network(network, x[:2])), torch.bfloat16, {})
    plan = replace(plan, steps=tuple(replace(step, kernel=kernel) for step in plan.steps))
    assert kernel in Engine(plan).kernels
    assert assert_same_bits(plan, x, (1, 6000)) > 0


def test_strips_are_as_high_as_the_cache_lets_them(isa: str) -> None:
    plan, _ = odd("block:16x16")
    engine, heights = Engine(plan), []
    for cache in CACHES:
        engine.set_strips(all_groups(plan)[:1], cache)
        heights.append(engine.strips[0][2])
    last = plan.steps[sum(all_groups(plan)[0]) - 1].output
    assert last is not None
    assert heights[0] == 1
    assert heights == sorted(heights)
    assert heights[-1] == plan.values[last].height


def test_groups_end_where_one_activation_is_alive_and_the_height_changes() -> None:
    plan = draft_plan(lowered("residual", "block:4x2")[1], torch.float32, {})
    names = [step.name.removesuffix(".0") for step in plan.steps]
    assert names[:7] == ["stem", "max_pool2d", "conv1", "conv2", "conv3", "conv4", "shortcut"]
    # The stem and its pool read 8 rows, the blocks, of which the second one has stride 2, 4.
    assert find_strips(plan) == (((0, 2), (2, 5)), ((2, 2), (4, 3)))


def test_the_faster_of_runs_pieces_and_neither_is_chosen() -> None:
    runs, pieces = [(0, 2), (2, 4), (7, 4)], [(2, 2), (4, 2), (7, 2), (9, 2), (12, 3)]
    alone = [1.0] * 15
    by_runs = [0.99, 0.98, *[0.8] * 4, 1.0, *[0.9] * 4, *[1.0] * 4]
    by_pieces = [1.0, 1.0, *[0.9] * 4, 1.0, 0.7, 0.7, 1.2, 1.2, 1.0, *[0.9] * 3]
    assert choose_strips(runs, pieces, alone, by_runs, by_pieces) == ((2, 4), (7, 2), (12, 3))


def test_a_kernel_without_rows_runs_step_by_step() -> None:
    plan = draft_plan(lowered("residual", "unstructured")[1], torch.float32, {})
    engine = Engine(replace(plan, strips=tuple(all_groups(plan))))
    assert engine.strips == []
    assert torch.equal(engine(networks.images(3).float()), Engine(plan)(networks.images(3).float()))


def test_strips_are_stored_and_explained(tmp_path: Path) -> None:
    network = prune(build("residual"), "block:4x2", 0.4).eval()
    x = networks.images(4).float()
    engine = compile(network, x, threads=2)
    groups = find_strips(engine.plan)[0]
    stripped = Engine(replace(engine.plan, strips=groups), engine.reports, threads=2)
    stripped.save(tmp_path / "engine")
    opened = load(tmp_path / "engine")
    assert opened.plan.strips == groups
    assert torch.equal(opened(x), engine(x))
    assert [group[:2] for group in opened.strips] == list(groups)
    assert "run together, " in str(opened.explain(quiet=True))
    data = torch.frombuffer(bytearray(b"".join(encode_plan(opened.plan))), dtype=torch.uint8)
    assert decode_plan(data, tmp_path).strips == groups


def test_compiling_keeps_what_is_faster_and_the_bits() -> None:
    plan, x = odd("block:16x16")
    engine = Engine(plan, threads=1)
    chosen = with_strips(engine, x)
    assert set(chosen.plan.strips) <= {*find_strips(plan)[0], *find_strips(plan)[1]}
    assert engine.strips == []
    assert torch.equal(chosen(x), engine(x))


@pytest.mark.parametrize("strips", [((0, 1),), ((0, 3), (2, 2)), ((2, 2), (0, 2)), ((0, 99),), ((3, 9),)])
def test_groups_that_cannot_be_are_refused(strips: tuple[tuple[int, int], ...]) -> None:
    plan = draft_plan(lowered("residual", "block:4x2")[1], torch.float32, {})
    with pytest.raises(ValueError, match="plan: expected strips of at least two steps that run by rows"):
        replace(plan, strips=strips)
    with pytest.raises(ValueError, match="strips: expected"):
        Engine(plan).set_strips(strips)


def test_profiling_counts_the_time_of_every_step_of_a_group() -> None:
    plan, x = odd("block:16x16")
    engine = Engine(plan, threads=1)
    engine.set_strips(all_groups(plan), 1)
    assert min(engine.profile(x)) > 0
