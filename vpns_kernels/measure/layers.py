"""Which layers does a network have, at which sizes? Read off the network, or from a list that was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vpns_kernels.geometry import ConvGeometry


@dataclass(frozen=True)
class Layer:
    """One distinct layer: its sizes, those of its input, and how many of the network's layers have them."""

    name: str
    geometry: ConvGeometry
    height: int
    width: int
    count: int = 1

    @property
    def is_linear(self) -> bool:
        """A 1×1 filter on one pixel; lists write linear layers so."""
        return self.geometry.kernel_size == (1, 1) and (self.height, self.width) == (1, 1)

    def build(self) -> nn.Conv2d | nn.Linear:
        """The torch layer, without bias, with torch's start."""
        g = self.geometry
        if self.is_linear:
            return nn.Linear(g.in_channels, g.out_channels, bias=False)
        sizes = (g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation, g.groups)
        return nn.Conv2d(*sizes, bias=False)


@torch.no_grad()
def layers_of(network: nn.Module, x: Tensor) -> list[Layer]:
    """The distinct layers that a forward pass of x runs through, in order, named after their first."""
    found: dict[Layer, list[str]] = {}

    def note(name: str, module: nn.Conv2d | nn.Linear, x: Tensor) -> None:
        height, width = (x.shape[2], x.shape[3]) if isinstance(module, nn.Conv2d) else (1, 1)
        layer = Layer("", ConvGeometry.from_module(module), height, width)
        found.setdefault(layer, []).append(name)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0]))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [replace(layer, name=names[0], count=len(names)) for layer, names in found.items()]


def read_layers(path: Path) -> list[Layer]:
    """The layers of a list; lines that begin with # explain.

    Raises:
        ValueError: names file and line where a line is not a name and ten numbers.
    """
    layers = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *sizes = line.split()
        if len(sizes) != 10 or not all(size.isdigit() for size in sizes):
            raise ValueError(f"read_layers: expected a name and 10 numbers, got {line!r} ({path}:{number})")
        C, K, R, S, stride, pad, groups, H, W, count = map(int, sizes)
        geometry = ConvGeometry(C, K, (R, S), (stride, stride), (pad, pad), groups=groups)
        layers.append(Layer(name, geometry, H, W, count))
    return layers


def format_layers(layers: Iterable[Layer]) -> str:
    """Lines that read_layers reads back; of a network of one's own, from layers_of.

    Raises:
        ValueError: a layer with two strides, two paddings, or dilation.
    """
    lines = ["# name C K R S stride pad groups H W count"]
    for layer in layers:
        g = layer.geometry
        if len({*g.stride}) > 1 or len({*g.padding}) > 1 or g.dilation != (1, 1):
            raise ValueError(f"format_layers: expected one stride and padding, no dilation, got {g}")
        sizes = [g.in_channels, g.out_channels, *g.kernel_size, g.stride[0], g.padding[0], g.groups]
        lines.append(" ".join(map(str, [layer.name, *sizes, layer.height, layer.width, layer.count])))
    return "\n".join(lines) + "\n"
