"""Do depthwise and narrowly grouped convolutions compute what torch does, at tiles' edges and everywhere?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.patterns import Block
from vpns_kernels.sparse_modules import SparseConv2d

LIBRARY = None if native.why_not() is not None else native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs the compiled library")
# The best of each instruction set, of depthwise layers and of groups.
KERNELS = {
    "avx2": ("depthwise_avx2", "grouped_avx2"),
    "avx512": ("depthwise_avx512", "grouped_avx512"),
    "avx512_bf16": ("depthwise_avx512", "grouped_avx512_bf16"),
}
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[isa for isa in KERNELS if LIBRARY is not None and isa in LIBRARY.isa_list()])
def kernels(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Of each instruction set that this machine has."""
    assert LIBRARY is not None
    LIBRARY.isa_cap(request.param)
    yield KERNELS[request.param]
    LIBRARY.isa_cap("")


def make(
    channels: int,
    size: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    act: str,
    kernel: str,
    width: int = 1,
) -> tuple[nn.Conv2d, SparseConv2d]:
    """A convolution by groups of that many channels, and the packed one that the kernel runs."""
    conv = nn.Conv2d(channels, channels, size, stride, padding, groups=channels // width).to(dtype)
    pattern = None if width == 1 else Block(width, width)
    return conv, SparseConv2d.from_dense(conv, pattern=pattern, kernel=kernel, act=act).eval()


def check(conv: nn.Conv2d, sparse: SparseConv2d, x: Tensor, generator: torch.Generator) -> None:
    """Against float64, with and without a residual."""
    y, dtype = sparse(x), x.dtype
    residual = torch.randn(y.shape, generator=generator).to(dtype)
    sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
    assert conv.bias is not None
    truth = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), *sizes)
    scale = F.conv2d(x.double().abs(), conv.weight.double().abs(), None, *sizes)
    for found, sums in ((y, truth), (sparse(x, residual), truth + residual.double())):
        acts = {"none": sums, "relu": sums.relu(), "relu6": sums.clamp(0, 6)}
        expected = acts[sparse.act]
        bound = BOUND[dtype] * expected.abs() + 2e-6 * (scale + residual.abs().double() + 1)
        assert bool(((found.double() - expected).abs() <= bound).all()), list(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_every_edge_of_a_depthwise_tile_is_right(
    size: int, stride: int, dtype: torch.dtype, kernels: tuple[str, str]
) -> None:
    generator = torch.Generator().manual_seed(size + 10 * stride)
    for channels in (1, 7, 8, 15, 16, 17, 40, 48):
        torch.manual_seed(channels)
        padding, act = channels % (size // 2 + 1), ("none", "relu", "relu6")[channels % 3]
        conv, sparse = make(channels, size, stride, padding, dtype, act, kernels[0])
        for _ in range(4):
            low = max(1, size - 2 * padding)
            height, width = torch.randint(low, low + 13, (2,), generator=generator).tolist()
            x = torch.randn(2, channels, height, width, generator=generator).to(dtype)
            check(conv, sparse, x, generator)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [4, 8])
def test_every_edge_of_a_tile_of_groups_is_right(
    width: int, stride: int, dtype: torch.dtype, kernels: tuple[str, str]
) -> None:
    generator = torch.Generator().manual_seed(width)
    kernel = kernels[1]
    if kernel.endswith("bf16") and dtype != torch.bfloat16:
        kernel = "grouped_avx512"
    for channels in (16, 32, 48, 80):
        torch.manual_seed(channels)
        act, padding = ("none", "relu", "relu6")[channels % 3], channels // 16 % 3
        conv, sparse = make(channels, 3, stride, padding, dtype, act, kernel, width)
        for _ in range(4):
            low = max(1, 3 - 2 * padding)
            height, columns = torch.randint(low, low + 13, (2,), generator=generator).tolist()
            x = torch.randn(2, channels, height, columns, generator=generator).to(dtype)
            check(conv, sparse, x, generator)


@torch.no_grad()
def test_layers_that_a_kernel_of_groups_does_not_take_are_refused(kernels: tuple[str, str]) -> None:
    cases = {
        "groups of 4 or 8 channels": (24, 3, 8),
        "3x3 filters": (32, 5, 8),
        "as blocks": (32, 3, 1),
    }
    for reason, (channels, size, width) in cases.items():
        _, sparse = make(channels, size, 1, 1, torch.bfloat16, "none", kernels[1], width)
        with pytest.raises(ValueError, match=f"it takes {reason}|takes groups {reason}"):
            sparse(torch.randn(1, channels, 8, 8).bfloat16())
    conv = nn.Conv2d(32, 32, 3, groups=8).bfloat16()
    conv.weight[5] = 0
    pruned = SparseConv2d.from_dense(conv, pattern=Block(1, 4), kernel=kernels[1]).eval()
    with pytest.raises(ValueError, match="it takes weights of which none is pruned"):
        pruned(torch.randn(1, 32, 8, 8).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize(("channels", "width"), [(24, 1), (32, 1), (32, 4), (48, 8)])
def test_an_output_reads_its_own_window_alone(channels: int, width: int, kernels: tuple[str, str]) -> None:
    """NaN in one pixel of a channel reaches the outputs of its group whose windows hold it."""
    _, sparse = make(channels, 3, 1, 1, torch.bfloat16, "none", kernels[width > 1], width)
    x = torch.zeros(1, channels, 9, 11).bfloat16()
    x[0, 20, 4, 6] = float("nan")
    expected = torch.zeros(1, channels, 9, 11, dtype=torch.bool)
    first = 20 // width * width
    expected[0, first : first + width, 3:6, 5:8] = True
    assert torch.equal(sparse(x).isnan(), expected)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "width"), [(72, 1), (64, 4)])
def test_the_answer_is_the_same_for_any_number_of_threads_and_any_batch(
    channels: int, width: int, kernels: tuple[str, str]
) -> None:
    _, sparse = make(channels, 3, 2, 1, torch.bfloat16, "relu6", kernels[width > 1], width)
    x = torch.randn(5, channels, 13, 14).bfloat16()
    y, threads = sparse(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(sparse(x), y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(sparse(x[i : i + 1]), y[i : i + 1]) for i in range(5))
    assert all(torch.equal(sparse(x), y) for _ in range(20))
