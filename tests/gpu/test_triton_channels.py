"""Channel-pruned and channel-masked convolutions by Triton, with their gradients, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vpns_kernels
from tests.gpu.test_gpu_waits import Reads
from tests.gpu.test_triton_gradients import DTYPES, draw, gradients
from vpns_kernels import ConvGeometry, pack, parse_pattern, unpack
from vpns_kernels.formats import pick
from vpns_kernels.ops._triton import channel_lists, rows
from vpns_kernels.ops._triton.channel_rows import ChannelRows
from vpns_kernels.ops._triton.channel_tiles import (
    pick_channel_gradient_tiles,
    pick_channel_tiles,
    pick_side,
    pick_step,
)
from vpns_kernels.testing import conv_excess, poisoned_memory

CHANNEL = parse_pattern("channel")
BLOCKS = parse_pattern("block:16x16")
LAYERS: dict[str, tuple[ConvGeometry, tuple[int, int, int]]] = {
    "3x3": (ConvGeometry(40, 48, (3, 3), padding=(1, 1)), (2, 5, 9)),
    "3x3_stride_2": (ConvGeometry(48, 40, (3, 3), (2, 2), (1, 1)), (3, 7, 6)),
    "1x1_stride_2": (ConvGeometry(16, 72, (1, 1), (2, 2)), (2, 5, 5)),
    "mixed_stride": (ConvGeometry(33, 17, (3, 5), (1, 2), (0, 3), (2, 1)), (2, 7, 6)),
    "two_strides_by_one_pixel": (ConvGeometry(16, 16, (3, 3), (2, 2), (1, 1)), (2, 1, 3)),
    "dilation_3": (ConvGeometry(19, 23, (3, 3), padding=(3, 3), dilation=(3, 3)), (1, 7, 11)),
    "stem": (ConvGeometry(3, 16, (5, 5), (2, 2), (2, 2)), (2, 9, 5)),
    "wide": (ConvGeometry(150, 140, (1, 1)), (1, 5, 7)),
    "linear": (ConvGeometry(70, 40, (1, 1)), (33, 1, 1)),
    "batch_0": (ConvGeometry(16, 16, (3, 3), padding=(1, 1)), (0, 4, 4)),
}
# Which outputs and inputs of a layer are kept.
KEPT = ("few", "one", "none", "all", "outputs", "inputs", "run")
# Every layer in every type, and every way to keep on two of them.
PACKED = [(layer, "few", dtype) for layer in LAYERS for dtype in DTYPES]
PACKED += [(layer, which, torch.float32) for layer in ("3x3_stride_2", "wide") for which in KEPT[1:]]
MASKED = [(layer, "few", torch.float32) for layer in LAYERS]
MASKED += [("mixed_stride", which, DTYPES[-1]) for which in ("few", "one", "none", "all")]


def kept_channels(count: int, which: str, side: str) -> Tensor:
    """bool [count]."""
    place = torch.arange(count)
    if which in ("all", "none"):
        return torch.full((count,), which == "all")
    if which in ("outputs", "inputs") and which != side:
        return torch.ones(count, dtype=torch.bool)
    if which == "one":
        return place == count // 2
    if which == "run":
        return (place >= count // 3 // 8 * 8) & (place < count // 3 + count // 2)
    generator = torch.Generator().manual_seed(count + len(side))
    return torch.rand(count, generator=generator) < 0.4


def keep(geometry: ConvGeometry, which: str) -> tuple[Tensor, Tensor]:
    """Kept outputs and inputs, bool."""
    counts = (geometry.out_channels, geometry.in_channels)
    outputs, inputs = (kept_channels(n, which, s) for n, s in zip(counts, ("outputs", "inputs"), strict=True))
    return outputs, inputs


def channel_mask(outputs: Tensor, inputs: Tensor, geometry: ConvGeometry) -> Tensor:
    return (outputs[:, None] & inputs[None, :])[..., None, None].expand(geometry.weight_shape).contiguous()


def make_packed(geometry: ConvGeometry, which: str, dtype: torch.dtype) -> vpns_kernels.formats.Packed:
    mask = channel_mask(*keep(geometry, which), geometry)
    return pack(draw(*geometry.weight_shape, seed=1), mask, CHANNEL, geometry, dtype)


def assert_within(found: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Sums in float32, rounded once to their type: `scale` is the sum of the terms' magnitudes.

    As in vpns_kernels.testing, a unit in the last place stays below the normal numbers what it is there.
    """
    kind = torch.finfo(dtype)
    error = (found.cpu().double() - truth).abs()
    unit = kind.eps * truth.abs().clamp(min=kind.smallest_normal)
    bound = 4 * torch.finfo(torch.float32).eps * scale + unit
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize(("layer", "which", "dtype"), PACKED, ids=str)
def test_a_packed_layer_and_its_gradients(
    layer: str, which: str, dtype: torch.dtype, device: torch.device
) -> None:
    geometry, (N, H, W) = LAYERS[layer]
    packed = make_packed(geometry, which, dtype)
    x = draw(N, geometry.in_channels, H, W, seed=2).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = draw(N, geometry.out_channels, *geometry.output_size(H, W), seed=4).to(dtype)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, packed.values)]
    layout = [t.to(device) for t in packed.layout]
    y = vpns_kernels.sparse_conv2d(leaves[0], leaves[1], layout, geometry, backend="triton")
    weight = unpack(packed.values, packed.layout, geometry)
    assert conv_excess(y.detach().cpu(), x, weight, None, geometry) <= 1
    last = grad.to(device).contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, leaves, last)
    expected_x, dense = gradients(x, weight, grad, geometry)
    scale_x, scale = gradients(x.abs(), weight.abs(), grad.abs(), geometry)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_within(found[0], expected_x, scale_x, dtype)
    units = [pick(t, packed.values.double(), packed.layout, geometry) for t in (dense, scale)]
    assert_within(found[1], units[0], units[1], dtype)
    again = vpns_kernels.sparse_conv2d(leaves[0], leaves[1], layout, geometry, backend="triton")
    for one, other in zip(found, torch.autograd.grad(again, leaves, last), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("layer", "which", "dtype"), MASKED, ids=str)
def test_a_masked_layer_and_its_gradients(
    layer: str, which: str, dtype: torch.dtype, device: torch.device
) -> None:
    geometry, (N, H, W) = LAYERS[layer]
    mask, _ = keep(geometry, which)
    weight, scores = draw(*geometry.weight_shape, seed=1), draw(*mask.shape, seed=5)
    x = draw(N, geometry.in_channels, H, W, seed=2).to(dtype)
    grad = draw(N, geometry.out_channels, *geometry.output_size(H, W), seed=4).to(dtype)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, scores)]
    y = vpns_kernels.masked_conv2d(
        leaves[0], weight.to(device), mask.to(device), leaves[1], geometry, CHANNEL, backend="triton"
    )
    found = torch.autograd.grad(y, leaves, grad.to(device))
    masked = (weight * CHANNEL.expand(mask, geometry.weight_shape)).to(dtype)
    assert conv_excess(y.detach().cpu(), x, masked, None, geometry) <= 1
    expected_x, _ = gradients(x, masked, grad, geometry)
    scale_x, _ = gradients(x.abs(), masked.abs(), grad.abs(), geometry)
    assert_within(found[0], expected_x, scale_x, dtype)
    _, dense = gradients(x, weight, grad, geometry)
    _, scale = gradients(x.abs(), weight, grad.abs(), geometry)
    expected = scores.double().sign() * CHANNEL.reduce_sum(weight.double() * dense)
    assert found[1].dtype == torch.float32
    assert_within(found[1], expected, CHANNEL.reduce_sum(weight.double().abs() * scale), torch.float32)


@pytest.mark.parametrize("memory", ["channels_last", "contiguous"])
@pytest.mark.parametrize("which", ["few", "run"])
def test_what_is_not_kept_reaches_nothing(which: str, memory: str, device: torch.device) -> None:
    geometry = ConvGeometry(48, 40, (3, 3), padding=(1, 1))
    outputs, inputs = keep(geometry, which)
    packed = make_packed(geometry, which, torch.float32)
    x, residual = draw(2, 48, 5, 6, seed=2), draw(2, 40, 5, 6, seed=3)
    bias = draw(40, seed=4)
    x[:, ~inputs] = float("nan")
    form = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    moved = (x.to(device).contiguous(memory_format=form), packed.values.to(device))
    layout = [t.to(device) for t in packed.layout]
    y = vpns_kernels.sparse_conv2d_fused(
        *moved, layout, geometry, bias.to(device), residual.to(device), "relu", backend="triton"
    ).cpu()
    rest = (bias.view(-1, 1, 1) + residual).relu()[:, ~outputs]
    assert torch.equal(y[:, ~outputs], rest)
    weight = unpack(packed.values, packed.layout, geometry)
    assert conv_excess(y, x.nan_to_num(), weight, bias, geometry, residual, "relu") <= 1


@pytest.mark.parametrize("which", ["few", "run", "blocks"])
def test_boxes_whose_pixels_lie_far_apart_are_counted_in_64_bits(
    which: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = LAYERS["3x3_stride_2"][0]
    packed = make_packed(geometry, which, torch.float32)
    if which == "blocks":
        weight = draw(*geometry.weight_shape, seed=4)
        kept = draw(*BLOCKS.units_shape(geometry.weight_shape), seed=5) > 0
        packed = pack(weight, BLOCKS.expand(kept, tuple(weight.shape)).contiguous(), BLOCKS, geometry)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (draw(3, 48, 7, 6, seed=2), packed.values)]
    layout, results = [t.to(device) for t in packed.layout], []
    for near in (rows.NEAR, 0):
        monkeypatch.setattr(rows, "NEAR", near)
        y = vpns_kernels.sparse_conv2d(leaves[0], leaves[1], layout, geometry, backend="triton")
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_runs_of_aligned_channels_are_read_by_descriptors(device: torch.device) -> None:
    x = torch.zeros(2, 64, 4, 4, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def is_run(kept: list[int], x: Tensor = x) -> bool:
        mask = torch.zeros(x.shape[1], dtype=torch.bool).index_fill_(0, torch.tensor(kept), True)
        geometry = ConvGeometry(x.shape[1], 1, (1, 1))
        weight = mask.to(x.dtype).view(1, -1, 1, 1)
        packed = pack(weight, weight != 0, CHANNEL, geometry)
        layout = [t.to(device) for t in packed.layout]
        channels = channel_lists.packed_channels(packed.values.to(device), layout, geometry)
        return ChannelRows.of(x, channels.inputs, (2, 2)).is_run

    assert is_run(list(range(64)))
    assert is_run([8, 9, 10])
    assert not is_run([9, 10])
    assert not is_run([8, 10])
    assert not is_run(list(range(64)), x.contiguous())
    # Rows of 60 channels begin anywhere; of one row of pixels, two classes are empty.
    assert not is_run([0, 1], x[:, :60].contiguous(memory_format=torch.channels_last))
    assert not is_run([0, 1], x[:, :, :1])


def test_a_mask_and_a_known_layout_hand_no_numbers_to_the_host(device: torch.device) -> None:
    geometry = LAYERS["3x3_stride_2"][0]
    packed = make_packed(geometry, "few", torch.float32)
    mask, _ = keep(geometry, "few")
    layout = [t.to(device) for t in packed.layout]
    x, values = (t.to(device, copy=True).requires_grad_() for t in (draw(1, 48, 5, 4, seed=2), packed.values))
    scores = draw(40, seed=5).to(device).requires_grad_()
    weight, mask = draw(*geometry.weight_shape, seed=1).to(device), mask.to(device)

    def run_both() -> None:
        y = vpns_kernels.sparse_conv2d(x, values, layout, geometry, backend="triton")
        y = y + vpns_kernels.masked_conv2d(x, weight, mask, scores, geometry, CHANNEL, backend="triton")
        torch.autograd.grad(y, (x, values, scores), torch.ones_like(y))

    run_both()
    with Reads() as reads:
        run_both()
    assert reads.names == []


def test_few_blocks_are_written_and_few_channels_read_beyond_those_kept() -> None:
    sides = (32, 64, 128)
    wanted = {0: 32, 1: 32, 33: 64, 65: 128, 150: 128, 300: 128}
    assert {count: pick_side(count, sides) for count in wanted} == wanted
    wanted = {0: 32, 1: 32, 33: 64, 65: 32, 100: 64}
    assert {count: pick_step(count, sides[:2]) for count in wanted} == wanted
    sizes, half = (128, 28, 28), torch.bfloat16
    gathered, run = (pick_channel_tiles(sizes, (100, 40), is_run, half, 9) for is_run in (False, True))
    assert (gathered.block, run.block) == ((128, 64), (64, 64))
    assert (gathered.tiles.pixels.size, run.tiles.pixels.size) == (64, 128)
    assert pick_channel_tiles(sizes, (100, 40), False, half, 8).block == (64, 32)
    # Threads multiply in full by themselves.
    full = [pick_channel_tiles(sizes, (99, 40), is_run, torch.float32, 9, "ieee") for is_run in (False, True)]
    assert [(found.block[0], found.tiles.warps) for found in full] == [(32, 4), (64, 8)]
    assert pick_channel_gradient_tiles(sizes, (65, 20), False, torch.float32, 8, "ieee").tiles.warps == 8
    assert pick_channel_gradient_tiles(sizes, (65, 20), False, half, 9).block == (64, 32)


@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (6, 5, 3, 3), (5, 3, 1, 1), (0, 4, 3, 3), (1, 1, 1, 1)])
def test_filters_that_lie_as_kernels_want_them_are_not_copied(shape: tuple[int, ...]) -> None:
    values = draw(*shape, seed=1).half()
    found = channel_lists.packed_filters(values, torch.float16)
    assert torch.equal(found, values)
    if found.numel():
        rows = channel_lists.filters(found, torch.float16)
        assert rows.data_ptr() == found.data_ptr()
        assert torch.equal(rows, values.permute(2, 3, 0, 1).flatten(0, 1))
        assert all(
            step % 8 == 0 for size, step in zip(rows.shape[:2], rows.stride()[:2], strict=True) if size > 1
        )


def test_a_layout_is_checked_once_and_a_hostile_one_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = LAYERS["3x3"][0]
    packed = make_packed(geometry, "few", torch.float32)
    x, values = draw(1, 40, 4, 4, seed=2).to(device), packed.values.to(device)
    layout = [t.to(device) for t in packed.layout]
    looks: list[Any] = []
    real = channel_lists.validate
    monkeypatch.setattr(channel_lists, "validate", lambda *args: (looks.append(args), real(*args)))
    for _ in range(3):
        vpns_kernels.sparse_conv2d(x, values, layout, geometry, backend="triton")
    assert len(looks) == 1
    hostile = [layout[0], layout[1].clone()]
    hostile[1][-1] = 1_000_000
    with pytest.raises(ValueError, match="expected kept input channels to ascend within"):
        vpns_kernels.sparse_conv2d(x, values, hostile, geometry, backend="triton")


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (ConvGeometry(32, 32, (3, 3), (3, 3)), r"strides of 1 and 2, got \(3, 3\)"),
        (ConvGeometry(32, 32, (3, 3), dilation=(200, 1)), "taps within 127 steps"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_and_who_does_is_named(
    geometry: ConvGeometry, reason: str, device: torch.device
) -> None:
    packed = make_packed(geometry, "few", torch.float32)
    x = torch.zeros(1, 32, 500, 8, device=device)
    layout = [t.to(device) for t in packed.layout]
    with pytest.raises(NotImplementedError, match=f"{reason}.*'compact', 'reference'"):
        vpns_kernels.sparse_conv2d(x, packed.values.to(device), layout, geometry, backend="triton")
    mask = torch.ones(32, dtype=torch.bool, device=device)
    weight = torch.zeros(geometry.weight_shape, device=device)
    with pytest.raises(NotImplementedError, match=f"{reason}.*'reference'"):
        vpns_kernels.masked_conv2d(x, weight, mask, mask.float(), geometry, CHANNEL, backend="triton")
