"""Are the layer lists those of the real networks, and do they read back?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vpns.models import MODELS
from vpns_kernels import ConvGeometry
from vpns_kernels.measure.layers import Layer, format_layers, layers_of, read_layers

LISTS = Path(__file__).resolve().parents[2] / "bench" / "layers"


def test_a_list_for_each_network_of_the_paper() -> None:
    assert {path.stem for path in LISTS.glob("*.txt")} == {"resnet18", "resnet50", "vgg16"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16"])
def test_a_list_holds_every_layer_of_its_network_at_224_px(name: str) -> None:
    # No numbers are needed to follow the sizes.
    with torch.device("meta"):
        network, x = MODELS[name](1000), torch.empty(1, 3, 224, 224)
    listed = read_layers(LISTS / f"{name}.txt")
    assert listed == layers_of(network, x)
    weights = sum(p.numel() for n, p in network.named_parameters() if p.dim() > 1)
    assert sum(layer.count * math.prod(layer.geometry.weight_shape) for layer in listed) == weights
    header = (LISTS / f"{name}.txt").read_text().split("# name")[0]
    assert "at 224 px" in header
    assert all(f"{word} " in header for word in ("C", "K", "R S", "H W"))
    assert "count" in header


def test_resnet18_has_twenty_convolutions_and_the_flops_of_the_literature() -> None:
    layers = read_layers(LISTS / "resnet18.txt")
    assert sum(layer.count for layer in layers) == 21
    flops = sum(layer.count * layer.geometry.flops(1, layer.height, layer.width) for layer in layers)
    assert flops == pytest.approx(2 * 1.814e9, rel=1e-3)


def test_layers_are_found_in_order_with_counts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(3, 9, 1)
            self.b, self.a = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2, groups=1)
            self.c, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x))).mean((2, 3)))

    network = Net()
    layers = layers_of(network, torch.randn(2, 3, 8, 6))
    assert layers == [
        Layer("a", ConvGeometry(3, 4, (2, 2), (2, 2)), 8, 6),
        Layer("b", ConvGeometry(4, 4, (3, 3), padding=(1, 1)), 4, 3, count=2),
        Layer("head", ConvGeometry(4, 2, (1, 1)), 1, 1),
    ]
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert [type(layer.build()) for layer in layers] == [nn.Conv2d, nn.Conv2d, nn.Linear]


def test_a_list_reads_back(tmp_path: Path) -> None:
    layers = [
        Layer("conv", ConvGeometry(8, 16, (3, 5), (2, 2), (1, 1), groups=4), 20, 30, 3),
        Layer("fc", ConvGeometry(8, 5, (1, 1)), 1, 1),
    ]
    (tmp_path / "list.txt").write_text("# explains\n\n" + format_layers(layers))
    assert read_layers(tmp_path / "list.txt") == layers
    for geometry in (ConvGeometry(1, 1, (3, 3), (1, 2)), ConvGeometry(1, 1, (3, 3), dilation=(2, 2))):
        with pytest.raises(ValueError, match="expected one stride and padding, no dilation"):
            format_layers([Layer("a", geometry, 9, 9)])


@pytest.mark.parametrize(
    "line", ["conv 1 2 3", "conv 3 64 7 7 2 3 1 224 224 1 1", "conv 3 64 7 7 2 -3 1 224 224 1"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"# explains\n{line}\n")
    with pytest.raises(ValueError, match=r"expected a name and 10 numbers, got .* \(.*list\.txt:2\)"):
        read_layers(tmp_path / "list.txt")
