"""Do masked and packed networks train under torch.compile(fullgraph=True), and are they exported?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vpns_kernels import parse_pattern
from vpns_kernels.batch_norms import fuse_batch_norms
from vpns_kernels.convert import freeze, mask_layers, mask_modules, sparsify, weight_masks
from vpns_kernels.tracing import trace


def make_network(spec: str, stage: str, fused: bool) -> nn.Module:
    """Masked as in search, or packed as in tuning; plain, or with batch norms that take in what follows."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    pattern = parse_pattern(spec)
    network = mask_layers(plain.requires_grad_(False), pattern)
    with torch.no_grad():
        for module in mask_modules(network).values():
            nn.init.normal_(module.scores)
            module.mask.copy_(torch.rand(module.mask.shape) < 0.6)
    if stage == "tune":
        network = sparsify(freeze(network), weight_masks(network), pattern).requires_grad_(True)
    if not fused:
        return network
    traced = trace(network)
    assert traced is not None
    assert len(fuse_batch_norms(traced)) == 2
    return traced


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stage", ["search", "tune"])
@pytest.mark.parametrize("spec", ["unstructured", "block:16x16", "channel"])
def test_a_compiled_network_learns_the_same_bits_and_is_exported(spec: str, stage: str, fused: bool) -> None:
    eager = make_network(spec, stage, fused)
    other, x = copy.deepcopy(eager), torch.randn(4, 3, 9, 9)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected, found = eager(x), compiled(x)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    learned = [parameter.grad for parameter in eager.parameters()]
    assert any(gradient is not None for gradient in learned)
    for ours, theirs in zip(other.parameters(), learned, strict=True):
        assert (ours.grad is None) == (theirs is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs)
    program = torch.export.export(eager.eval(), (x,))
    assert any("vpns" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), eager(x))
