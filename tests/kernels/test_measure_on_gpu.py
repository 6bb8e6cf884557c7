"""Is a network measured on a GPU as on the CPU? By fakes: its steps on the CPU, events that count."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tests.kernels.networks import Residual
from vpns_kernels import parse_pattern
from vpns_kernels.measure import bench_network, on_gpu
from vpns_kernels.measure.network import _bench
from vpns_kernels.measure.network_targets import network_targets
from vpns_kernels.measure.on_gpu import AUTOTUNED, EAGER, find_gpu, find_gpu_rivals, interleave_events
from vpns_kernels.measure.random_network import maskable_layers, prune_randomly, scale_weights
from vpns_kernels.measure.timing import interleave
from vpns_kernels.measure.whole_network import Clock


@dataclass
class Event:
    """Tells how often anything was done before it."""

    done: list[str]
    told: list[int] = field(default_factory=list)

    def record(self, stream: str) -> None:
        assert stream == "current of cuda:1"
        self.told.append(len(self.done))

    def synchronize(self) -> None:
        assert self.told

    def elapsed_time(self, other: Event) -> float:
        return float(other.told[0] - self.told[0])


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An opponent that is not compiled."""
    monkeypatch.setitem(on_gpu._MAKERS, AUTOTUNED, on_gpu._eager)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_time_is_that_between_two_events_and_warming_up_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    device = torch.device("cuda:1")
    done: list[str] = []
    calls = {"one": lambda: done.append("one"), "three": lambda: done.extend(["three"] * 3)}
    samples = interleave_events(calls, 4, warmup=2, device=device, make_event=lambda: Event(done))
    assert samples["one"].times_ms == (1.0,) * 4
    assert samples["three"].times_ms == (3.0,) * 4
    assert done == ["one", *["three"] * 3] * 6


@pytest.mark.usefixtures("_on_the_cpu")
def test_a_network_of_a_run_is_told_of_as_on_the_cpu() -> None:
    pattern, dense = parse_pattern("block:4x4"), scale_weights(Residual())
    pruned = prune_randomly(dense, pattern, 0.35, 0, images())
    clock = Clock(interleave, on_gpu._layers, on_gpu._take)
    found = _bench(find_gpu_rivals(pruned, images()), clock, pruned, pattern, images(), rounds=6)
    expected = bench_network(pruned, pattern, images(), rounds=2)
    assert found.keys() == expected.keys()
    assert found["layers"][0].keys() == expected["layers"][0].keys()
    assert set(found["dense"]) == {EAGER, AUTOTUNED}
    assert found["best_dense"] in found["dense"]
    assert found["dense_dtype"] == "bfloat16"
    assert found["max_rel_err"] <= 0.1
    assert {row["layer"] for row in found["layers"]} >= set(maskable_layers(dense))
    assert all(row["dense_ms"] > 0 for row in found["layers"])


@pytest.mark.usefixtures("_on_the_cpu")
def test_opponents_have_the_dense_outputs_and_others_are_refused() -> None:
    network = scale_weights(Residual())
    rivals = find_gpu_rivals(network, images(), [EAGER])
    assert list(rivals.calls) == [EAGER]
    assert not rivals.counts
    assert find_gpu_rivals(network, images()).counts
    assert rivals.calls[EAGER]().dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"expected opponents on a GPU in .*, got \['openvino bfloat16'\]"):
        find_gpu_rivals(network, images(), ["openvino bfloat16"])


def test_goals_of_networks_by_name_are_a_cpus() -> None:
    cell = {
        "model": "resnet50", "family": "block", "pattern": "block:32x32", "density": 0.1, "batch": 16,
        "size": 224, "speedup": 3.0, "speedup_low": 2.9, "best_dense_counts": True, "sparse_flops_frac": 1.0,
        "max_rel_err": 0.0, "sparse_dtype": "bfloat16", "flops_ratio": 10.0, "seeds": [],
        "dense": {}, "against": {}, "layers": [],
    }  # fmt: skip
    on_cpu, on_gpu_ = (network_targets([cell | {"device": device}]) for device in ("cpu", "cuda"))
    assert len(on_cpu) == len(on_gpu_) + 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"GPU that torch can use as 'cuda', got 0 .*--device cpu"):
        find_gpu("cuda")
    with pytest.raises(ValueError, match="expected device cpu or cuda, got 'meta'"):
        find_gpu("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_gpu("cuda") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="as 'cuda:1', got 1"):
        find_gpu("cuda:1")
