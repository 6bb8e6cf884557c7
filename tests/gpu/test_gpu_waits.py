"""How often does the host wait for the device in an update? Once, for the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.test_triton_training import CLASSES, DENSITY, PATTERN, make_batch, make_predictor
from vpns.accelerate import fuse_predictor, set_backends
from vpns.label_map import LabelMap, identity_map
from vpns.masking import refresh
from vpns.step import Learner, train_step
from vpns_kernels import native

# What hands a tensor's numbers to Python, or needs them to know how large its result is.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class Reads(TorchDispatchMode):
    """Collects the names of operators that a host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        # An index of bools has as many results as are True.
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(READS) or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def make_update(stage: str, device: torch.device) -> Callable[[], object]:
    """An update by the Triton kernels, which ran once: what is listed at first use is there."""
    fused, _ = fuse_predictor(make_predictor(stage, device))
    set_backends(fused.network, "triton")
    learned = [parameter for parameter in fused.parameters() if parameter.requires_grad]
    optimizer, batch = torch.optim.SGD(learned, 0.1), make_batch(fused, device)
    label_map = LabelMap(identity_map(CLASSES, CLASSES)).to(device)

    def follow() -> None:
        if stage == "search":
            refresh(fused.network, PATTERN, DENSITY, "exact")

    def update() -> None:
        train_step(Learner(fused, label_map, optimizer, follow), [batch])

    update()
    return update


@pytest.mark.parametrize("stage", ["search", "tune"])
def test_no_operator_of_an_update_hands_numbers_to_the_host(
    stage: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where the compiled library takes no part; there the masks' NaN is not looked for either.
    monkeypatch.setattr(native, "why_not", lambda: "not in this test")
    update = make_update(stage, device)
    with Reads() as reads:
        update()
    looks = 1 if stage == "search" and device.type == "cpu" else 0
    assert reads.names == ["_local_scalar_dense"] * looks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed to count what waits for it")
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_the_host_waits_for_a_gpu_once_in_an_update(stage: str, device: torch.device) -> None:
    update = make_update(stage, device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def test_reads_are_seen() -> None:
    x: Tensor = torch.arange(3)
    with Reads() as reads:
        _ = x.sum().item(), x.nonzero(), bool(x.any()), x[x > 1]
    assert reads.names == ["_local_scalar_dense", "nonzero", "_local_scalar_dense", "index"]
