"""Are channels cut behind every way to read them, left where pixels are read, and by other tools' masks?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from vpns_kernels.convert import densify, sparsify
from vpns_kernels.shrink import shrink


class Reads(nn.Module):
    """A convolution of eight channels, of which four are pruned, and a linear layer behind `read`."""

    def __init__(self, read: Callable[[Tensor], Tensor], inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.conv, self.fc = read, nn.Conv2d(3, 8, 3), nn.Linear(inputs, 4)
        with torch.no_grad():
            self.conv.weight[4:] = 0
            self.conv.bias[4:] = 0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.read(F.relu(self.conv(x))))
        return y


READS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "view, size": (lambda y: y.view(y.size(0), -1), 8 * 36, 4),
    "reshape, shape": (lambda y: y.reshape(y.shape[0], -1), 8 * 36, 4),
    "flatten": (lambda y: torch.flatten(y, 1), 8 * 36, 4),
    "mean": (lambda y: y.mean((2, 3)), 8, 4),
    # These read pixels, or channels and pixels mixed: nothing can be cut.
    "rows of pixels": (lambda y: y[..., :4].repeat(1, 1, 1, 2), 8, 8),
    "as they are": (lambda y: y, 6, 8),
    "flattened in part": (lambda y: y.flatten(1, 2), 6, 8),
}


@torch.no_grad()
@pytest.mark.parametrize("name", READS)
def test_channels_are_cut_where_a_linear_layer_reads_them_and_nowhere_else(name: str) -> None:
    read, inputs, left = READS[name]
    network, x = Reads(read, inputs).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = shrink(network, x)
    assert small.get_submodule("conv").out_channels == left
    torch.testing.assert_close(small(x), network(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_masks_of_torchs_own_pruning_are_applied() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.enable_grad():
        prune.ln_structured(network[0], "weight", 0.5, 1, 0)
    network[0].bias.zero_()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 8, 8)
    small = shrink(network, x)
    assert small.get_submodule("0").out_channels == 4
    torch.testing.assert_close(densify(sparsify(network))(x), network(x))
