"""Does a fused network give the outputs of the one it was made of, and is only taken in what may be?"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.kernels.networks import ALL, build, images
from vpns.models import MODELS
from vpns_kernels import parse_pattern
from vpns_kernels.convert import densify, freeze, mask_layers, mask_modules, sparsify, weight_masks
from vpns_kernels.fusing import fuse
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

# What is left of a network of which every layer is pruned: batch norms, activations, adds.
LEFT = {
    "residual": (0, 0, 0),
    "pre-activation": (2, 2, 0),
    "depthwise": (0, 0, 0),
    "vgg": (0, 1, 0),
    "bare": (0, 0, 0),
    "two readers": (0, 1, 0),
    "grouped": (0, 0, 0),
}


def sparse_network(network: nn.Module, spec: str = "unstructured") -> nn.Module:
    """Half of the units of each layer kept."""
    generator = torch.Generator().manual_seed(13)
    masked = mask_layers(network, parse_pattern(spec)).eval()
    with torch.no_grad():
        for module in mask_modules(masked).values():
            module.mask.copy_(torch.rand(module.mask.shape, generator=generator) < 0.5)
    return sparsify(freeze(masked), weight_masks(masked), parse_pattern(spec)).eval()


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms of no special value."""
    torch.manual_seed(11)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval()


def count_left(network: nn.Module) -> tuple[int, int, int]:
    """Calls of batch norms, activations and adds in a traced network."""
    assert isinstance(network, fx.GraphModule)
    kinds: Counter[str] = Counter()
    for node in network.graph.nodes:
        called = network.get_submodule(node.target) if node.op == "call_module" else node.target
        name = type(called).__name__ if node.op == "call_module" else getattr(called, "__name__", str(called))
        kinds[name.lower().strip("_")] += 1
    acts = sum(kinds[name] for name in ("relu", "relu6"))
    return kinds["batchnorm2d"], acts, sum(kinds[name] for name in ("add", "iadd"))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["unstructured", "block:2x3", "nm:2:4"])
@pytest.mark.parametrize("name", ALL)
def test_networks_of_every_kind_keep_their_outputs(name: str, spec: str) -> None:
    if name in ("depthwise", "grouped") and spec.startswith("block"):
        spec = "block:1x3"
    sparse = sparse_network(build(name), spec)
    before, x = copy.deepcopy(sparse.state_dict()), images()
    fused = fuse(sparse)
    torch.testing.assert_close(fused(x), sparse(x))
    assert count_left(fused) == LEFT[name]
    torch.testing.assert_close(sparse.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in fused.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_batch_norms_are_folded_into_dense_convolutions_too(name: str) -> None:
    network = build(name).eval()
    fused = fuse(network)
    torch.testing.assert_close(fused(images()), network(images()))
    assert count_left(fused)[0] == LEFT[name][0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_residual_network_is_left_with_its_pooling(name: str) -> None:
    network = with_statistics(MODELS[name](5))
    sparse = sparse_network(network.double())
    fused, x = fuse(sparse), torch.randn(2, 3, 37, 33, dtype=torch.float64)
    torch.testing.assert_close(fused(x), sparse(x))
    assert count_left(fused) == (0, 0, 0)
    assert {type(m) for m in fused.modules() if not list(m.children())} == {
        SparseConv2d, SparseLinear, nn.MaxPool2d, nn.AdaptiveAvgPool2d,
    }  # fmt: skip


class Inverted(nn.Module):
    """MobileNetV2's block: widen, depthwise, project; added where sizes are equal, without an activation."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.is_added = stride == 1 and channels == out
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_added else self.conv(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inverted_bottlenecks_are_fused_and_cast_afterwards(dtype: torch.dtype) -> None:
    blocks = [Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), *blocks)
    sparse, x = sparse_network(with_statistics(network)), torch.randn(2, 3, 19, 23)
    fused = fuse(sparse)
    assert count_left(fused) == (0, 0, 0)
    acts = Counter(module.act for module in fused.modules() if isinstance(module, SparseConv2d))
    assert acts == {"relu6": 7, "none": 3}
    expected = sparse.double()(x.double())
    found = copy.deepcopy(fused).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 10)


class Added(nn.Module):
    """Two 3x3 convolutions of three channels, added in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.narrow, self.way = nn.Conv2d(3, 1, 1), way
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "later shortcut":
            y = self.second(x)
            y += self.narrow(x)
            return self.relu(y)
        if self.way == "into the shortcut":
            shortcut = x
            x += self.second(x)
            return x + shortcut
        if self.way == "input changed in between":
            y = self.second(x)
            return y + self.relu(x)
        if self.way == "shortcut changed in between":
            y, z = self.second(x), x
            x.relu_()
            return y + z
        if self.way == "broadcast":
            return self.second(x) + self.narrow(x)
        if self.way == "scaled":
            return torch.add(x, self.second(x), alpha=2)
        if self.way == "twice the same":
            y = self.second(x)
            return F.relu(y + y)
        if self.way == "called twice":
            return self.second(self.second(x)) + x
        if self.way == "read elsewhere":
            y = self.second(x)
            return F.relu(y + x) + y
        return F.relu(x.add(self.second(x)))


WAYS = {
    # Which adds are left.
    "later shortcut": 1, "into the shortcut": 2, "input changed in between": 1,
    "shortcut changed in between": 1, "broadcast": 1, "scaled": 1, "twice the same": 1, "called twice": 1,
    "read elsewhere": 2, "method": 0,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_an_add_is_taken_in_where_nothing_else_can_see_it(way: str) -> None:
    torch.manual_seed(3)
    sparse = sparse_network(Added(way).double())
    fused, x = fuse(sparse), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(x), sparse(x))
    assert count_left(fused)[2] == WAYS[way]


class Shortcut(nn.Module):
    """A block whose shortcut, a layer of its own, is made last and added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.shortcut, self.norm = nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += self.norm(self.shortcut(x))
        return F.relu(y, inplace=True)


@torch.no_grad()
def test_the_later_of_two_convolutions_takes_the_add() -> None:
    sparse = sparse_network(with_statistics(Shortcut()).double())
    fused, x = fuse(sparse), torch.randn(2, 3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), sparse(x))
    assert count_left(fused) == (0, 0, 0)
    assert (fused.conv.act, fused.shortcut.act) == ("none", "relu")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Optional(Branching):
    def forward(self, x: Tensor, is_doubled: bool | None = None) -> Tensor:
        return self.conv(x) if is_doubled is None else 2 * self.conv(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Branching, Optional])
def test_what_cannot_be_traced_stays_as_it_is(kind: type[nn.Module]) -> None:
    sparse = sparse_network(with_statistics(kind()))
    fused, x = fuse(sparse), torch.rand(2, 3, 4, 4)
    assert type(fused) is kind
    assert fused is not sparse
    for given in (x, -x):
        assert torch.equal(fused(given), sparse(given))


@torch.no_grad()
def test_a_layer_that_is_watched_is_left_and_its_hook_still_called() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    sparse, seen = sparse_network(with_statistics(network)), []
    sparse[1].register_forward_hook(lambda module, given, y: seen.append(y))
    fused, x = fuse(sparse), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fused(x), sparse(x))
    assert len(seen) == 2
    assert count_left(fused)[0] == 1


def test_a_fused_network_is_not_made_dense() -> None:
    sparse = sparse_network(with_statistics(Inverted(8, 8, 1)))
    for network in (sparse, nn.Sequential(sparse.conv[6], nn.ReLU()).eval()):
        with pytest.raises(
            ValueError, match=r"densify: expected layers as sparsify makes them, got residual or act"
        ):
            densify(fuse(network))
    assert isinstance(densify(sparse), Inverted)


def test_a_network_in_training_mode_is_refused() -> None:
    sparse = sparse_network(build("residual"))
    sparse.bn1.train()
    with pytest.raises(ValueError, match=r"fuse: expected evaluation mode, got layer 'bn1' in training mode"):
        fuse(sparse)
