"""Whole networks against dense engines: random masks, who may be called best, goals, and no wrong figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.networks import Residual, depthwise
from vpns_kernels import parse_pattern
from vpns_kernels.engine import compile
from vpns_kernels.measure import OPPONENTS, Opponent, Sample
from vpns_kernels.measure.dense_layers import time_dense_layers
from vpns_kernels.measure.deployed import Deployed
from vpns_kernels.measure.network_targets import network_targets
from vpns_kernels.measure.random_network import is_pruned, maskable_layers, prune_randomly, scale_weights
from vpns_kernels.measure.whole_network import (
    FURTHER,
    Clock,
    Rivals,
    Settings,
    _fastest,
    _largest_error,
    _race,
    bench_whole,
    find_rivals,
)
from vpns_kernels.shrink import shrink

QUICK = Settings(rounds=6, layer_rounds=2, rest_s=0.0, dtype="float32")


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("spec", "density"), [("unstructured", 0.1), ("block:4x4", 0.35), ("channel", 0.5)])
def test_every_layer_keeps_the_same_share_of_its_units_and_the_stem_all(spec: str, density: float) -> None:
    dense, pattern = scale_weights(Residual()), parse_pattern(spec)
    pruned = prune_randomly(dense, pattern, density, seed=3, x=images())
    assert not pruned.training
    assert not is_pruned(dense)
    assert is_pruned(pruned)
    for name in maskable_layers(dense):
        weight = pruned.get_submodule(name).weight
        units = pattern.reduce_sum((weight != 0).float()) > 0
        # The classes of the head are nobody's to prune by channel.
        expected = (
            units.numel() if spec == "channel" and name == "head" else int(density * units.numel() + 0.5)
        )
        assert int(units.sum()) == expected
    if spec != "channel":
        assert bool((pruned.get_submodule("stem").weight != 0).all())


def test_masks_follow_the_seed_and_leave_the_dense_network_as_it_was() -> None:
    dense = scale_weights(Residual(), seed=5)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pattern = parse_pattern("unstructured")
    a, b, c = (prune_randomly(dense, pattern, 0.2, seed, images()) for seed in (1, 1, 2))
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert torch.equal(scale_weights(Residual(), seed=5).conv1.weight, dense.conv1.weight)


def test_activations_of_a_pruned_network_neither_fade_nor_grow() -> None:
    pruned = prune_randomly(scale_weights(Residual()), parse_pattern("unstructured"), 0.1, 0, images(8))
    seen = {}
    pruned.bn4.register_forward_hook(lambda module, args, out: seen.update(out=out))
    pruned(images(8))
    assert float(seen["out"].detach().std()) == pytest.approx(1, abs=0.2)


def test_a_single_image_calibrates_as_many_do() -> None:
    # Of one image that has shrunk to a pixel the variance is 0, and what is left is rounding.
    network, pattern = scale_weights(Residual()), parse_pattern("unstructured")
    alone, many = (prune_randomly(network, pattern, 0.5, 0, images(count)[..., :2, :2]) for count in (1, 8))
    ratio = alone.bn4.running_var / many.bn4.running_var
    assert float(ratio.min()) > 0.1
    assert float(ratio.max()) < 10


@torch.no_grad()
def test_a_network_without_a_way_through_is_right_where_it_gives_zeros() -> None:
    network, x = nn.Conv2d(3, 4, 1, bias=False), images(2)
    nn.init.zeros_(network.weight)
    assert _largest_error(network, torch.zeros(2, 4, 8, 8), x) == 0
    with pytest.raises(RuntimeError, match="off by inf"):
        _largest_error(network, torch.ones(2, 4, 8, 8), x)


def test_depthwise_layers_stay_dense() -> None:
    assert list(maskable_layers(depthwise())) == ["6", "10"]


def test_dense_layers_are_told_in_order_with_shape_density_and_time() -> None:
    pruned = prune_randomly(scale_weights(Residual()), parse_pattern("unstructured"), 0.25, 0, images())
    rows = time_dense_layers(pruned, images(), rounds=1)
    assert [row["layer"] for row in rows][:3] == ["stem", "conv1", "conv2"]
    assert rows[1]["shape"] == "8→8 3x3 @4x4"
    assert rows[1]["density"] == rows[1]["weight_density"] == 0.25
    assert rows[1]["flops"] == 2 * 4 * 16 * 8 * 8 * 9
    assert rows[-1]["shape"] == "12→5 linear"
    assert all(row["dense_ms"] > 0 and row["best_dense"].startswith("torch") for row in rows)


def test_a_missing_engine_stops_the_measurement_unless_others_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = {name: lambda n, subject: Opponent(n, None, "not installed") for name in OPPONENTS}
    eager = OPPONENTS["torch float32"]
    for name, build in absent.items():
        monkeypatch.setitem(OPPONENTS, name, build)
    monkeypatch.setitem(OPPONENTS, "torch float32", eager)
    network = nn.Conv2d(3, 4, 1)
    with pytest.raises(
        RuntimeError, match=r"'torch bfloat16', got: not installed .*--opponents 'torch float32'"
    ):
        find_rivals(network, images())
    assert list(find_rivals(network, images(), ["torch float32"]).calls) == ["torch float32"]
    with pytest.raises(RuntimeError, match="'openvino int8', got: not installed"):
        find_rivals(network, images(), ["torch float32", "openvino int8"])


def test_the_best_dense_counts_only_beside_the_compiler_and_openvino() -> None:
    def call() -> Tensor:
        return torch.zeros(1)

    both = {"torch.compile bfloat16": call, "openvino bfloat16": call}
    assert Rivals(both).counts
    assert not Rivals({"openvino bfloat16": call}).counts
    assert not Rivals({"torch float32": call}).counts


def test_only_contenders_run_in_all_rounds() -> None:
    taken = {
        "a float32": 10.0,
        "b float32": 14.0,
        "a bfloat16": 5.0,
        "b bfloat16": 6.0,
        FURTHER[0]: 99.0,
        "s": 1.0,
    }

    def fake(calls: dict[str, Any], rounds: int, **settings: Any) -> dict[str, Sample]:
        return {name: Sample((taken[name],) * rounds) for name in calls}

    everybody = {name: lambda: torch.zeros(1) for name in taken}
    sparse = {"s": everybody.pop("s")}
    samples = _race(everybody, sparse, Settings(rounds=30, clock=Clock(interleave=fake)))
    rounds = {name: len(sample.times_ms) for name, sample in samples.items()}
    assert rounds == {
        "a float32": 30,
        "b float32": 3,
        "a bfloat16": 30,
        "b bfloat16": 30,
        FURTHER[0]: 30,
        "s": 30,
    }


def test_what_was_timed_in_the_first_rounds_alone_is_not_the_fastest() -> None:
    dense = dict.fromkeys(("a float32", "b float32"), lambda: torch.zeros(1))
    samples = {"a float32": Sample((2.0,) * 30), "b float32": Sample((1.0,) * 3)}
    assert _fastest(dense, samples) == "a float32"


@pytest.mark.parametrize("spec", ["block:4x4", "channel"])
def test_a_cell_tells_times_ratios_errors_and_layers(spec: str) -> None:
    dense, pattern, x = scale_weights(Residual()), parse_pattern(spec), images()
    rivals = find_rivals(dense, x, ["torch float32"])
    pruned = (prune_randomly(dense, pattern, 0.5, seed, x) for seed in range(2))
    cell = bench_whole(rivals, pruned, pattern, x, QUICK)
    assert cell["best_dense"] == "torch float32"
    assert not cell["best_dense_counts"]
    assert cell["dense"]["torch float32"]["rounds"] == 6
    assert cell["sparse_dtype"] == "float32"
    assert cell["max_rel_err"] <= 1e-4
    assert 0.1 < cell["weight_density"] < 0.7
    assert [row["seed"] for row in cell["seeds"]] == [0, 1]
    assert cell["speedup_low"] <= cell["speedup_high"]
    names = [row["layer"] for row in cell["layers"]]
    assert names[:2] == ["stem", "conv1"]
    assert sum(row["share"] for row in cell["layers"]) == pytest.approx(1)
    assert all(row["reason"] for row in cell["layers"])
    assert 0 <= cell["sparse_flops_frac"] <= 1
    if spec == "channel":
        by_name = {row["layer"]: row for row in cell["layers"]}
        assert by_name["conv2"]["reason"] == (
            "channel pruning left 4 of 8 output and 4 of 8 input channels; the smaller layer runs dense"
        )
        assert cell["flops_ratio"] > 2


class Chosen(nn.Module):
    """Some of a network's classes, as a label map takes them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rows", torch.tensor([3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).index_select(1, self.rows)


@pytest.mark.parametrize("spec", [None, "block:4x4", "channel"])
def test_classes_that_a_label_map_leaves_are_not_pruned_channels(spec: str | None) -> None:
    pattern, x = None if spec is None else parse_pattern(spec), images()
    dense = scale_weights(Residual())
    pruned = dense if pattern is None else prune_randomly(dense, pattern, 0.5, 0, x)
    smaller = shrink(pruned) if spec == "channel" else pruned
    engine = compile(Chosen(smaller).eval(), x, "float32")
    assert engine.plan.layers[-1].packed.geometry.out_channels == 2
    rows = Deployed(Chosen(pruned).eval(), pattern, x, engine=engine).rows()
    head = rows["network.head"]
    if spec == "channel":
        assert head["reason"] == ("channel pruning left 6 of 12 input channels; the smaller layer runs dense")
    else:
        assert "channel pruning" not in "".join(row["reason"] for row in rows.values())
    if spec is None:
        assert {row["choice"] for row in rows.values()} == {"dense"}


def test_a_wrong_answer_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = scale_weights(Residual()), images()
    other = scale_weights(Residual(), seed=9)
    monkeypatch.setattr("vpns_kernels.measure.deployed.Deployed.__call__", lambda self, x: other(x))
    with pytest.raises(RuntimeError, match="expected the outputs of the pruned network, got some off by"):
        bench_whole(
            find_rivals(dense, x, ["torch float32"]), [dense], parse_pattern("unstructured"), x, QUICK
        )


def cell(**changes: Any) -> dict[str, Any]:
    settings = {
        "model": "resnet50", "pattern": "block:32x32", "family": "block", "density": 0.1, "batch": 32,
        "size": 224, "device": "cpu", "speedup": 3.5, "speedup_low": 3.4, "best_dense_counts": True,
        "sparse_flops_frac": 0.95,
        "flops_ratio": 5.0, "max_rel_err": 0.01, "sparse_dtype": "bfloat16",
        "against": {"openvino int8": {"median": 1.9}, "torch float32": {"median": 9.0}},
    }  # fmt: skip
    return settings | changes


def verdicts(**changes: Any) -> dict[str, tuple[float | None, bool]]:
    return {
        row["name"].split(": ")[1]: (row["value"], row["met"]) for row in network_targets([cell(**changes)])
    }


def test_goals_are_judged_by_ratio_interval_share_and_error() -> None:
    assert verdicts() == {
        "over the best dense": (3.5, True),
        "over the best dense int8": (1.9, False),
        "never slower than the best dense, lower end of 95 %": (3.4, True),
        "FLOPs that ran sparse": (0.95, True),
        "largest error, of the largest output": (0.01, True),
    }
    assert verdicts(model="own", family="channel") == {
        "never slower than the best dense, lower end of 95 %": (3.4, True),
        "over the ratio of FLOPs": (0.7, False),
        "largest error, of the largest output": (0.01, True),
    }
    assert verdicts(family="unstructured")["over the best dense float32"] == (9.0, True)
    assert list(verdicts(density=0.5, family="unstructured")) == ["largest error, of the largest output"]


def test_a_best_that_does_not_count_meets_no_goal() -> None:
    found = verdicts(best_dense_counts=False)
    assert found["over the best dense"] == (None, False)
    assert found["never slower than the best dense, lower end of 95 %"] == (None, False)
