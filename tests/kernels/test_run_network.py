"""Is a run's network measured as it is deployed, beside the dense engines that are installed?"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.networks import Residual
from vpns_kernels import parse_pattern
from vpns_kernels.measure import Sample, bench_network
from vpns_kernels.measure.network import QUICK_OPPONENTS
from vpns_kernels.measure.random_network import maskable_layers, prune_randomly, scale_weights
from vpns_kernels.measure.timing import drop_hopeless


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_engine_that_is_installed_is_an_opponent_and_layers_have_both_times() -> None:
    pattern, dense = parse_pattern("block:4x4"), scale_weights(Residual())
    found = bench_network(prune_randomly(dense, pattern, 0.35, 0, images()), pattern, images(), rounds=6)
    installed = [n for n in QUICK_OPPONENTS if n.startswith("torch") or find_spec(n.split()[0]) is not None]
    assert list(found["dense"]) == installed
    assert found["dense_ms"] == min(timed["median_ms"] for timed in found["dense"].values())
    assert {row["layer"] for row in found["layers"]} >= set(maskable_layers(dense))
    assert all(row["dense_ms"] > 0 and row["reason"] for row in found["layers"])
    assert sum(row["share"] for row in found["layers"]) <= 1 + 1e-9


class Branching(nn.Module):
    """What it does next depends on its own numbers: nothing can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        y: Tensor = self.fc(x + 1 if float(x.sum()) > 1e9 else x)
        return y


def test_a_network_that_cannot_be_traced_runs_as_torch_calls_its_layers() -> None:
    network = Branching().eval()
    with torch.no_grad():
        network.conv.weight[:, 1:].zero_()
    found = bench_network(network, parse_pattern("unstructured"), images(), rounds=6)
    (conv, fc) = found["layers"]
    assert (conv["layer"], conv["density"]) == ("conv", pytest.approx(1 / 3))
    assert conv["reason"] == "the network cannot be traced: torch calls each layer"
    assert conv["speedup"] == pytest.approx(conv["dense_ms"] / conv["sparse_ms"])
    assert (fc["sparse_ms"], fc["speedup"], fc["choice"]) == (None, None, "dense")
    assert found["max_rel_err"] < 1e-5


@pytest.mark.parametrize(("slow_ms", "kept"), [(900.0, True), (1100.0, False)])
def test_what_is_hopelessly_slow_is_not_timed_again(slow_ms: float, kept: bool) -> None:
    calls = {"fast": lambda: None, "slow": lambda: None}
    timed = {"fast": Sample((100.0,)), "slow": Sample((slow_ms,)), "other": Sample((1.0,))}
    assert ("slow" in drop_hopeless(calls, timed)) == kept
