"""What runs a layer on a GPU that nobody has measured? The same for the same sizes, with its reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vpns_kernels import explain
from vpns_kernels.choose import break_even_density, choose, this_machine
from vpns_kernels.choose_gpu import gpu_kernel
from vpns_kernels.choose_training import choose_training
from vpns_kernels.cost import LayerQuery
from vpns_kernels.geometry import ConvGeometry

GPU = this_machine(torch.device("cuda"))
GEOMETRY, SIZE = ConvGeometry(128, 128, (3, 3), padding=(1, 1)), (16, 14, 14)


def query(block: tuple[int, int] = (32, 32), density: float = 0.1, dtype: str = "bfloat16") -> LayerQuery:
    return LayerQuery(GEOMETRY, SIZE, (0, *block), dtype).at_density(density)


def test_few_blocks_run_by_the_kernels_of_blocks_in_all_passes() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for with_scores in (False, True):
            chosen = choose_training(query(dtype=dtype), GPU, with_scores=with_scores)
            assert chosen.backends == ("triton",) * 3
    reason = choose(query(), GPU).reason
    assert reason == "triton: no costs were measured on this GPU; blocks of 32x32 at density 0.097"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (query(density=0.6), "more than 0.5 is kept (0.6)"),
        (query((8, 16)), "takes blocks with sides of 16"),
        (query((16, 48)), "takes blocks with sides of 16"),
        (LayerQuery(GEOMETRY, SIZE, (1000,)), "triton: it takes blocks and channels"),
        (replace(query(), geometry=replace(GEOMETRY, groups=2)), "groups"),
        (query(dtype="float64"), "float64"),
    ],
)
def test_what_has_no_kernel_is_dense_and_the_reason_is_named(layer: LayerQuery, reason: str) -> None:
    chosen = choose(layer, GPU)
    assert chosen.kernel == "dense"
    assert chosen.reason.startswith("dense: no costs were measured on this GPU; ")
    assert reason in chosen.reason
    assert choose_training(layer, GPU).backends == ("reference",) * 3


def test_small_blocks_stay_dense_though_a_kernel_should_take_them() -> None:
    kernel, reason = gpu_kernel(query((8, 8)), [("triton", "")])
    assert (kernel, reason.partition("; ")[2]) == ("dense", "blocks of 8x8 have sides below 16")


@pytest.mark.parametrize(
    ("layer", "kernel", "reason"),
    [
        (LayerQuery(GEOMETRY, SIZE, (40, 40, 3, 3)), "triton", "channels gathered 9 times at density 0.098"),
        (LayerQuery(GEOMETRY, SIZE, (40, 128, 3, 3)), "triton", "channels, all inputs kept, at density 0.31"),
        (
            LayerQuery(ConvGeometry(512, 512, (3, 3)), SIZE, (129, 100, 3, 3)),
            "compact",
            "channels gathered 18 times at density 0.049",
        ),
        (LayerQuery(ConvGeometry(32, 32, (5, 5)), SIZE, (9, 9, 5, 5)), "compact", "gathered 25 times"),
        (
            LayerQuery(replace(GEOMETRY, stride=(3, 3)), SIZE, (40, 40, 3, 3)),
            "compact",
            "gathered 9 times at density 0.098",
        ),
    ],
)
def test_few_channels_are_gathered_by_the_kernel_or_once_before_a_smaller_layer(
    layer: LayerQuery, kernel: str, reason: str
) -> None:
    chosen = choose(layer, GPU)
    assert chosen.kernel == kernel
    assert chosen.reason.startswith(f"{kernel}: no costs were measured on this GPU; ")
    assert reason in chosen.reason
    assert choose_training(layer, GPU).backends == (kernel,) * 3
    assert choose(layer.at_density(0.9), GPU).kernel == "dense"


def test_without_triton_blocks_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpns_kernels.choose_gpu.find_spec", lambda name: None)
    assert "triton is not installed" in choose(query(), GPU).reason
    assert choose(LayerQuery(GEOMETRY, SIZE, (40, 40, 3, 3)), GPU).kernel == "compact"


def test_nothing_is_estimated_and_the_limit_is_told() -> None:
    chosen = choose(query(), GPU)
    assert math.isnan(chosen.est_ms)
    assert all(candidate.estimate is None for candidate in chosen.candidates)
    assert break_even_density(query(), GPU) == pytest.approx(0.5, abs=0.01)
    conv = nn.Conv2d(128, 128, 3, padding=1)
    text = str(explain(conv, (16, 14, 14), machine=GPU, quiet=True))
    assert "a GPU" in text
    assert "no costs were measured on this GPU" in text
    assert "nan" not in text
