"""Does a network whose batch norms take in what follows them train as before?"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpns.config import ModelConfig
from vpns.models import build_model
from vpns_kernels.batch_norms import BatchNormAct2d, fuse_batch_norms
from vpns_kernels.tracing import trace


class Block(nn.Module):
    """Residuals from before and from behind, an in-place add, and an activation that somebody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu6(self.norms[0](self.convs[0](x)))
        second = self.norms[1](self.convs[1](first))
        second += first
        third = torch.relu(second)
        fourth = self.norms[2](self.convs[2](third))
        y = F.relu(fourth + self.norms[3](self.convs[3](third)))
        both = self.norms[4](y)
        result: Tensor = both.relu() + both
        return result


def fused_twin(model: nn.Module) -> tuple[nn.Module, list[str]]:
    traced = trace(model)
    assert traced is not None
    return traced, fuse_batch_norms(traced)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert leaf.grad is not None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), leaf.grad, gradients


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.detach().double() - theirs.detach().double()).norm()
    return float(difference / theirs.detach().double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_gradients_and_statistics_are_those_of_the_separate_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Block().to(dtype)
    copied = copy.deepcopy(plain)
    fused, _ = fused_twin(copied)
    x = torch.randn(3, 4, 7, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    for _ in range(3):
        expected, found = run(plain, x), run(fused, x)
        assert relative(found[0], expected[0]) < bound
        assert relative(found[1], expected[1]) < bound
        assert found[2].keys() == expected[2].keys()
        for name, gradient in expected[2].items():
            assert relative(found[2][name], gradient) < bound, name
    # The statistics are those of the network it was traced from: buffers are shared.
    for name, buffer in plain.named_buffers():
        assert relative(copied.get_buffer(name), buffer) < bound, name
    assert int(copied.get_buffer("norms.0.num_batches_tracked")) == 3
    plain.eval(), fused.eval()
    assert relative(fused(x), plain(x)) < bound


def test_only_what_nobody_else_reads_is_taken_in() -> None:
    fused, names = fused_twin(Block())
    assert names == [f"norms.{i}" for i in range(5)]
    acts = [fused.get_submodule(name).act for name in names]
    # Of the third and fourth, one takes the other as its residual, and the activation.
    assert acts[0] == "relu6"
    assert acts[1] == "relu"
    assert sorted(acts[2:4]) == ["none", "relu"]
    assert acts[4] == "none"


def test_the_network_it_was_traced_from_stays_as_it_is() -> None:
    plain = Block()
    fused, _ = fused_twin(plain)
    assert all(type(norm) is nn.BatchNorm2d for norm in plain.norms)
    shared = dict(fused.named_parameters())
    assert all(shared[name] is parameter for name, parameter in plain.named_parameters())


@pytest.mark.parametrize(("name", "relus"), [("resnet18", 17), ("resnet50", 49), ("vgg16_bn", 13)])
def test_the_known_networks_keep_no_add_and_no_activation_behind_a_batch_norm(name: str, relus: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name), 10, 0)
    fused, names = fused_twin(model)
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert [fused.get_submodule(n).act for n in names].count("relu") == relus
    behind = [node.all_input_nodes[0] for node in fused.graph.nodes if "relu" in f"{node.op} {node.target}"]
    assert all("classifier" in str(node.target) for node in behind)
    assert not [
        node for node in fused.graph.nodes if node.op == "call_function" and "add" in str(node.target)
    ]


def test_a_residual_of_another_size_is_added_as_torch_does() -> None:
    layer = BatchNormAct2d.from_batch_norm(nn.BatchNorm2d(3), "relu")
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 1, 1)
    expected = F.relu(F.batch_norm(x, None, None, layer.weight, layer.bias, True) + residual)
    assert relative(layer(x, residual), expected) < 1e-6


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_any_momentum(momentum: float | None) -> None:
    plain = nn.BatchNorm2d(3, momentum=momentum)
    twin = BatchNormAct2d.from_batch_norm(copy.deepcopy(plain), "relu")
    for seed in range(3):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed
        plain(x), twin(x)
    torch.testing.assert_close(twin.running_mean, plain.running_mean)
    torch.testing.assert_close(twin.running_var, plain.running_var)


def test_what_follows_may_write_over_a_batch_norm_without_activation() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 4, 1))
    traced = trace(copy.deepcopy(plain))
    assert traced is not None
    assert fuse_batch_norms(traced) == ["1"]
    x = torch.randn(4, 3, 9, 9)
    for network in (plain, traced):
        network(x).square().sum().backward()
    for ours, theirs in zip(traced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_identities_do_not_keep_an_activation_from_its_batch_norm() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True)))
    assert traced is not None
    assert fuse_batch_norms(traced) == ["1"]
    assert traced.get_submodule("1").act == "relu"
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
