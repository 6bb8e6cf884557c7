"""Is a channel-pruned network cut to size, with the outputs of the masked one, and is nothing else cut?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.networks import FOLLOWED, build, images
from vpns_kernels import parse_pattern
from vpns_kernels.convert import freeze, mask_layers, mask_modules
from vpns_kernels.shrink import shrink
from vpns_kernels.torchvision_import import import_torchvision

BOUND = 1e-12


def published(name: str) -> nn.Module:
    """torchvision's network in float64, with batch norms of no special value; eval mode."""
    torch.manual_seed(3)
    is_vgg = name.startswith("vgg")
    # Its classifier would be a gigabyte: a smaller one, of the same form.
    with torch.device("meta" if is_vgg else "cpu"):
        network = getattr(import_torchvision("models"), name)(num_classes=9)
    if is_vgg:
        network.features.to_empty(device="cpu")
        network.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Linear(16, 9))
    network = network.double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.3, generator=generator)
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return network


def draw(shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < 0.5


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121"])
def test_zero_filters_are_cut_out_of_published_networks(name: str) -> None:
    network, generator = published(name), torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight[draw(module.out_channels, generator)] = 0
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    small = shrink(network)
    assert largest_error(small(x), network(x)) <= BOUND
    assert size(small) < 0.75 * size(network)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_masked_published_networks_become_as_small_as_their_masks(name: str) -> None:
    masked, generator = mask_layers(published(name), parse_pattern("channel")).double(), torch.Generator()
    for module in mask_modules(masked).values():
        module.mask.copy_(draw(module.mask.numel(), generator))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    small = shrink(masked)
    assert largest_error(small(x), masked(x)) <= BOUND
    # About half of the channels on either side.
    assert size(small) < 0.35 * size(masked)


@torch.no_grad()
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_masked_network_shrinks_to_the_kept_channels(name: str) -> None:
    masked = mask_layers(build(name), parse_pattern("channel")).double().eval()
    generator = torch.Generator().manual_seed(6)
    for module in mask_modules(masked).values():
        module.mask.copy_(draw(module.mask.numel(), generator))
        module.mask[0] = True
    small = shrink(masked, images())
    assert largest_error(small(images()), masked(images())) <= BOUND
    kept = sorted(int(module.mask.sum()) for module in mask_modules(masked).values())
    widths = {p.shape[0] for n, p in small.named_parameters() if n.endswith("weight")}
    assert set(kept) <= widths
    assert set(small.state_dict()) == set(freeze(masked).state_dict())
    # Nothing is left to cut.
    assert size(shrink(small)) == size(small)


def stack(padding: int, slope: float = 0.0) -> nn.Sequential:
    """Two convolutions with batch norm between; channel 1 of the first is a filter of zeros."""
    torch.manual_seed(7)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(slope),
        nn.Conv2d(4, 5, 3, padding=padding, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.LazyLinear(2),
    ).double().eval()  # fmt: skip
    network(images())
    with torch.no_grad():
        network[0].weight[1] = 0
        network[1].running_mean.normal_()
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("padding", "shift", "left"),
    [(1, -2.0, 3), (1, 2.0, 4), (0, 2.0, 3)],
    ids=["silent behind ReLU", "seen at the border", "held by the bias"],
)
def test_a_constant_channel_goes_only_where_nothing_is_lost_at_the_border(
    padding: int, shift: float, left: int
) -> None:
    network = stack(padding)
    network[1].bias[1], network[1].running_mean[1] = shift, 0.0
    small = shrink(network)
    assert small.get_submodule("0").out_channels == left
    assert small.get_submodule("3").in_channels == left
    assert (small.get_submodule("3").bias is not None) == (padding == 0)
    assert largest_error(small(images()), network(images())) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize(("counts", "left"), [(True, 4), (False, 3)])
def test_behind_a_mean_that_counts_padding_a_constant_is_none(counts: bool, left: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=counts), nn.Conv2d(4, 2, 1)
    ).double().eval()  # fmt: skip
    network[0].weight[2] = 0
    small = shrink(network)
    assert small.get_submodule("0").out_channels == left
    assert largest_error(small(images()), network(images())) <= BOUND


@torch.no_grad()
def test_channels_that_nobody_reads_are_cut_and_what_made_them_in_turn() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)).double().eval()
    network[2].weight[:, 2:] = 0
    network[1].weight[:2, 3] = 0
    small = shrink(network)
    # Channel 3 of the first is read by rows that are cut themselves.
    assert [small.get_submodule(name).weight.shape[:2] for name in "012"] == [(3, 3), (2, 3), (2, 2)]
    assert largest_error(small(images()), network(images())) <= BOUND


@torch.no_grad()
def test_one_channel_stays_of_a_layer_that_is_all_zeros() -> None:
    network = stack(padding=1)
    network[0].weight.zero_()
    network[1].bias.fill_(-1)
    network[1].running_mean.zero_()
    small = shrink(network)
    assert small.get_submodule("0").out_channels == 1
    assert largest_error(small(images()), network(images())) <= BOUND


@torch.no_grad()
def test_keep_drops_channels_of_a_residual_stream_together_and_only_together() -> None:
    network = build("residual").eval()
    mask = torch.tensor([True, False] * 4)
    small = shrink(network, keep={"stem": mask})
    for name in ("stem", "bn", "conv2", "bn2"):
        assert small.get_submodule(name).weight.shape[0] == 4
    assert small.get_submodule("conv1").in_channels == small.get_submodule("conv3").in_channels == 4
    assert size(shrink(network, keep={"stem": mask, "conv2": mask})) == size(small)
    with pytest.raises(ValueError, match="same channels kept by 'stem' and 'conv2'"):
        shrink(network, keep={"stem": mask, "conv2": ~mask})


@torch.no_grad()
def test_rows_of_the_classifier_stay_in_the_order_asked_for() -> None:
    network = build("residual").eval()
    small = shrink(network, images(), rows=[3, 0])
    assert small.get_submodule("head").out_features == 2
    torch.testing.assert_close(small(images()), network(images())[:, [3, 0]])
    assert size(network) - size(small) == 3 * 13


class InPlace(nn.Module):
    """The ReLU in place changes what the second convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 6, 1) for c in (3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = F.relu(x, inplace=True)
        return self.conv2(x) + self.conv3(y)


class Gate(nn.Module):
    """Squeeze and excite, and a path that reads channels in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.flip, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(self.flip(x).flip(1))


class Twice(nn.Module):
    """One convolution called twice, another one whose weight is read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 6, 1) for c in (3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv2(self.conv1(x)))) * self.conv3.weight.sum()


@torch.no_grad()
@pytest.mark.parametrize("kind", [InPlace, Gate, Twice])
def test_what_is_not_followed_stays_and_the_outputs_are_right(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(8)
    network = kind().double().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight[::2] = 0
            assert module.bias is not None
            module.bias[::2] = -module.bias[::2].abs()
    small = shrink(network)
    assert largest_error(small(images()), network(images())) <= BOUND


@torch.no_grad()
def test_the_network_itself_stays_and_its_memory_format_is_taken_over() -> None:
    network = build("residual").eval().to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = shrink(network, keep={"conv1": torch.tensor([True] * 5 + [False] * 3)})
    assert small.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    assert small.get_parameter("conv2.weight").shape == (8, 5, 3, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def all_but(**settings: Any) -> Any:
    return lambda: shrink(build("residual").eval(), **settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shrink(build("residual").train()), ValueError, "expected evaluation mode"),
        (lambda: shrink(Branching().eval()), NotImplementedError, "torch.fx can trace, got Branching"),
        (all_but(keep={"pool": torch.ones(8).bool()}), ValueError, "got 'pool'"),
        (all_but(keep={"stem": torch.ones(9).bool()}), ValueError, "bool masks of 8 channels for 'stem'"),
        (all_but(keep={"stem": torch.ones(8)}), ValueError, "got torch.float32"),
        (all_but(keep={"head": torch.zeros(5).bool()}), ValueError, "can be cut, got 'head'"),
        (all_but(rows=[5]), ValueError, r"different rows in 0..4, at least one, got \[5\]"),
        (all_but(rows=[1, 1]), ValueError, "different rows"),
        (all_but(rows=[]), ValueError, "at least one"),
    ],
)
def test_what_cannot_be_done_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class Drawn(nn.Module):
    """A network of random operations on random earlier activations, with zeros at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers, self.script, widths = nn.ModuleList(), [], [3]
        for _ in range(rng.randint(6, 14)):
            kind = rng.choice(
                ["conv", "conv", "conv1", "depthwise", "norm", "act", "add", "mul", "cat", "pool", "bias"]
            )
            source = rng.randrange(max(0, len(widths) - 4), len(widths))
            same = [i for i, width in enumerate(widths) if width == widths[source]]
            other = rng.choice(same) if kind in ("add", "mul") else rng.randrange(len(widths))
            width = widths[source]
            layer: nn.Module = nn.Identity()
            if kind in ("conv", "conv1"):
                size, bias = (3, 1)[kind == "conv1"], rng.random() < 0.5
                width = rng.choice([4, 4, 6])
                layer = nn.Conv2d(widths[source], width, size, padding=size // 2, bias=bias)
            elif kind == "depthwise":
                layer = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=rng.random() < 0.5)
            elif kind == "norm":
                layer = nn.BatchNorm2d(width)
            elif kind == "act":
                layer = rng.choice(
                    [nn.ReLU(), nn.Sigmoid(), nn.SiLU(), nn.ReLU(inplace=True), nn.Dropout(0.5)]
                )
            elif kind == "pool":
                layer = rng.choice(
                    [
                        nn.MaxPool2d(3, 1, 1),
                        nn.AvgPool2d(3, 1, 1),
                        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                    ]
                )
            elif kind == "cat":
                width += widths[other]
            widths.append(width)
            self.layers.append(layer)
            self.script.append((kind, source, other))
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for (kind, source, other), layer in zip(self.script, self.layers, strict=True):
            a, b = seen[source], seen[other]
            if kind == "add":
                seen.append(a + b)
            elif kind == "mul":
                seen.append(a * b)
            elif kind == "cat":
                seen.append(torch.cat([a, b], 1))
            elif kind == "bias":
                seen.append(a + 0.5)
            else:
                seen.append(layer(a))
        return self.head(seen[-1].mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(60))
def test_networks_of_any_form_compute_the_same_when_they_are_smaller(seed: int) -> None:
    torch.manual_seed(seed)
    network, generator = Drawn(seed).double().eval(), torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            nn.init.normal_(module.weight, generator=generator)
            module.weight[draw(len(module.weight), generator)] = 0
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
            if module.bias is not None:
                module.bias.normal_(generator=generator)
                module.bias[draw(len(module.bias), generator)] = 0
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                module.weight[:, draw(module.weight.shape[1], generator)] = 0
    small = shrink(network)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator)
    # In-place activations write into the input of the network itself.
    torch.testing.assert_close(small(x.clone()), network(x.clone()), rtol=BOUND, atol=BOUND)
    assert size(small) <= size(network) + sum(
        m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)
    )
