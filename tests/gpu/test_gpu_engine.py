"""Does a whole network run by the GPU's engine, block kernels and graphs included, as in torch?"""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vpns_kernels import compile, load, parse_pattern
from vpns_kernels.convert import freeze, mask_layers, mask_modules
from vpns_kernels.engine import GpuEngine
from vpns_kernels.engine.gpu_compile import MAY_STOP
from vpns_kernels.engine.gpu_kernels import KERNELS
from vpns_kernels.engine.gpu_weights import LayerWeights
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_gpu)]


class Blocks(nn.Module):
    """A stem, a residual block with a stride, a 1x1 layer, the average, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv1, self.conv2 = nn.Conv2d(32, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(32, 64, 1, 2), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


def make_network(spec: str = "block:16x16") -> nn.Module:
    torch.manual_seed(4)
    network = Blocks()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    masked = mask_layers(network, parse_pattern(spec)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in mask_modules(masked).items():
            if name != "stem":
                module.mask.copy_(torch.rand(module.mask.shape, generator=generator) < 0.4)
    return freeze(masked).eval()


def images(count: int, device: torch.device) -> Tensor:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    return x.to(device)


def assert_close(engine: GpuEngine, network: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Within twice the error of torch's own network of that type, and some roundings of the largest."""
    with torch.no_grad():
        truth = copy.deepcopy(network).to(x.device).double()(x.double())
        theirs = copy.deepcopy(network).to(x.device, dtype)(x.to(dtype)).double()
    bound = 2 * (theirs - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    y = engine(x)
    assert (y.dtype, y.shape, y.device) == (torch.float32, truth.shape, x.device)
    assert float((y.double() - truth).abs().max()) <= float(bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["block:16x16", "channel"])
def test_pruned_layers_run_by_the_kernels_of_their_pattern(
    spec: str, device: torch.device, dtype: torch.dtype
) -> None:
    network = make_network(spec)
    plan = draft_plan(lower(trace_network(network, images(2, torch.device("cpu")))), dtype, {})
    engine = GpuEngine(plan, device)
    by_name = {step.name: kernel for step, kernel in zip(plan.steps, engine.kernels, strict=True)}
    assert {by_name[name] for name in ("conv1", "conv2", "shortcut", "head")} == {"triton"}
    # The stem's outputs are channels, too.
    assert by_name["stem"] == ("triton" if spec == "channel" else "dense")
    assert_close(engine, network, images(3, device), dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["block:16x16", "channel", "nm:2:4"])
def test_every_kernel_of_every_layer_gives_the_same_on_a_gpu(
    spec: str, dtype: torch.dtype, device: torch.device
) -> None:
    network = make_network(spec)
    plan = draft_plan(lower(trace_network(network, images(2, torch.device("cpu")))), dtype, {})
    for step in plan.steps:
        if step.layer is not None:
            weights = LayerWeights.of_step(plan, step, device)
            for name in [name for name, kind in KERNELS.items() if kind.why_not(weights) is None]:
                try:
                    engine = GpuEngine(plan, device, {step.name: name})
                    engine(images(8, device))
                except RuntimeError:
                    if name not in MAY_STOP:
                        raise
                    continue
                assert_close(engine, network, images(8, device), dtype)


@needs_gpu
def test_a_compiled_network_is_recorded_for_each_batch_size_and_may_be_called_from_anywhere(
    device: torch.device, tmp_path: Path
) -> None:
    network = make_network()
    engine = compile(network, images(8, device))
    assert isinstance(engine, GpuEngine)
    expected = {count: engine(images(count, device)) for count in (1, 3, 8)}
    assert engine.batch_sizes == [1, 3, 8]
    found: list[bool] = []

    def call(count: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = images(count, device)
            same = [torch.equal(engine(x), expected[count]) for _ in range(50)]
            found.append(all(same))

    threads = [threading.Thread(target=call, args=(count,)) for count in (1, 3, 8, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert torch.cuda.get_device_name(device) in str(engine.explain(quiet=True))
    engine.save(tmp_path / "engine")
    again = load(tmp_path / "engine", device=device)
    assert again.kernels == engine.kernels
    assert torch.equal(again(images(3, device)), expected[3])
    on_cpu = load(tmp_path / "engine")
    torch.testing.assert_close(on_cpu(images(3, device).cpu()), expected[3].cpu(), rtol=0.05, atol=0.05)
    seconds = engine.profile(images(8, device))
    assert len(seconds) == len(engine.plan.steps)
    assert min(seconds) > 0
