"""Which network is measured where none is pruned? One of He-scaled weights and random masks, by layer."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from vpns_kernels.convert import freeze, mask_layers, mask_modules
from vpns_kernels.patterns import Channel, Pattern

# Images that tell batch norms the scale of what they see.
_CALIBRATION_IMAGES = 8
# A layer with a larger share of zeros was pruned by somebody.
_PRUNED_FRAC = 0.05


def is_pruned(network: nn.Module) -> bool:
    """Whether some layer holds more zeros than chance puts there."""
    return any(float((m.weight == 0).float().mean()) > _PRUNED_FRAC for m in _layers(network).values())


def kept_frac(network: nn.Module) -> float:
    """Share in [0, 1] of the weights of convolutions and linear layers that are not zero."""
    weights = [layer.weight for layer in _layers(network).values()]
    return sum(int((weight != 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def scale_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy in evaluation mode with weights of Kaiming He's scale, drawn from the seed, and no biases."""
    drawn, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for layer in _layers(drawn).values():
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return drawn.eval()


@torch.no_grad()
def prune_randomly(network: nn.Module, pattern: Pattern, density: float, seed: int, x: Tensor) -> nn.Module:
    """A copy with zeros where a random mask is False; batch norms have the statistics of images like x.

    Every layer keeps round-half-up(density · units) of its units, but the first convolution and depthwise
    ones, which stay dense. Channels are kept by stream of tied channels, the first one among them.

    Args:
        network: in evaluation mode.
        x: [N, C, H, W] float32.

    Raises:
        NotImplementedError: the channel pattern on a network whose channels cannot be followed.
    """
    pattern.check_density(density)
    generator = torch.Generator().manual_seed(seed)
    pruned = copy.deepcopy(network)
    if isinstance(pattern, Channel):
        masked = mask_layers(pruned, pattern)
        for module in mask_modules(masked).values():
            module.mask.copy_(draw_units((module.mask.numel(),), density, generator))
        pruned = freeze(masked)
        _calibrate(pruned, x)
        # Freezing made silent channels of batch norms: calibration moved their statistics alone.
        return pruned.eval()
    for layer in maskable_layers(pruned).values():
        shape = tuple(layer.weight.shape)
        units = draw_units(pattern.units_shape(shape), density, generator)
        layer.weight.mul_(pattern.expand(units, shape))
    _calibrate(pruned, x)
    return pruned.eval()


def maskable_layers(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Layers that random masks prune: not the first convolution, and not depthwise ones."""
    layers = _layers(network)
    stem = next((name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    return {name: m for name, m in layers.items() if name != stem and not _is_depthwise(m)}


def draw_units(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    """Bool of a shape with exactly round-half-up(density · units) entries True, at least one."""
    units = torch.zeros(math.prod(shape), dtype=torch.bool)
    kept = max(1, math.floor(density * units.numel() + 0.5))
    units[torch.randperm(units.numel(), generator=generator)[:kept]] = True
    return units.view(shape)


def _calibrate(network: nn.Module, x: Tensor) -> None:
    """Without it, activations of a pruned network of random weights fade away with depth."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    before = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    network(_calibration_images(x))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _calibration_images(x: Tensor) -> Tensor:
    """Those of x, filled up with drawn ones: in a single image, a single pixel has no variance."""
    missing = max(0, _CALIBRATION_IMAGES - len(x))
    drawn = torch.randn(missing, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.cat([x[:_CALIBRATION_IMAGES], drawn.to(x)])


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _layers(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
