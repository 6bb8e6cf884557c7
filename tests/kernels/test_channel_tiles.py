"""Do tiles of depthwise convolutions compute what torch does, at their edges and on every instruction set?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vpns_kernels import native
from vpns_kernels.sparse_modules import SparseConv2d

LIBRARY = None if native.why_not() is not None else native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs the compiled library")
KERNELS = {"avx2": "depthwise_avx2", "avx512": "depthwise_avx512", "avx512_bf16": "depthwise_avx512"}
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[isa for isa in KERNELS if LIBRARY is not None and isa in LIBRARY.isa_list()])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of each instruction set that this machine has."""
    assert LIBRARY is not None
    LIBRARY.isa_cap(request.param)
    yield KERNELS[request.param]
    LIBRARY.isa_cap("")


def make(channels: int, size: int, stride: int, padding: int, dtype: torch.dtype, act: str, kernel: str):
    conv = nn.Conv2d(channels, channels, size, stride, padding, groups=channels).to(dtype)
    return conv, SparseConv2d.from_dense(conv, kernel=kernel, act=act).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_every_edge_of_a_tile_is_right(size: int, stride: int, dtype: torch.dtype, kernel: str) -> None:
    generator = torch.Generator().manual_seed(size + 10 * stride)
    for channels in (1, 7, 8, 15, 16, 17, 40, 48):
        torch.manual_seed(channels)
        padding, act = channels % (size // 2 + 1), ("none", "relu", "relu6")[channels % 3]
        conv, sparse = make(channels, size, stride, padding, dtype, act, kernel)
        for _ in range(4):
            low = max(1, size - 2 * padding)
            height, width = torch.randint(low, low + 13, (2,), generator=generator).tolist()
            x = torch.randn(2, channels, height, width, generator=generator).to(dtype)
            y = sparse(x)
            residual = torch.randn(y.shape, generator=generator).to(dtype)
            truth = F.conv2d(
                x.double(), conv.weight.double(), conv.bias.double(), stride, padding, groups=channels
            )
            scale = F.conv2d(x.double().abs(), conv.weight.double().abs(), None, stride, padding, 1, channels)
            for found, sums in ((y, truth), (sparse(x, residual), truth + residual.double())):
                acts = {"none": sums, "relu": sums.relu(), "relu6": sums.clamp(0, 6)}
                expected = acts[act]
                bound = BOUND[dtype] * expected.abs() + 2e-6 * (scale + residual.abs().double() + 1)
                assert bool(((found.double() - expected).abs() <= bound).all()), (channels, height, width)


@torch.no_grad()
@pytest.mark.parametrize("channels", [24, 32])
def test_an_output_reads_its_own_window_alone(channels: int, kernel: str) -> None:
    """NaN in one pixel of a channel reaches the outputs of that channel whose windows hold it."""
    _, sparse = make(channels, 3, 1, 1, torch.float32, "none", kernel)
    x = torch.zeros(1, channels, 9, 11)
    x[0, 20, 4, 6] = float("nan")
    expected = torch.zeros(1, channels, 9, 11, dtype=torch.bool)
    expected[0, 20, 3:6, 5:8] = True
    assert torch.equal(sparse(x).isnan(), expected)


@torch.no_grad()
def test_the_answer_is_the_same_for_any_number_of_threads_and_any_batch(kernel: str) -> None:
    _, sparse = make(72, 3, 2, 1, torch.bfloat16, "relu6", kernel)
    x = torch.randn(5, 72, 13, 14).bfloat16()
    y, threads = sparse(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(sparse(x), y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(sparse(x[i : i + 1]), y[i : i + 1]) for i in range(5))
    assert all(torch.equal(sparse(x), y) for _ in range(20))
