"""Is an iteration of search and of tuning by the Triton kernels that of torch's dense layers?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vpns.accelerate import choose_backends, fuse_predictor, set_backends
from vpns.batches import Batch
from vpns.config import PromptConfig
from vpns.label_map import LabelMap, identity_map
from vpns.masking import attach_masks, refresh, unit_scores
from vpns.predictor import Predictor
from vpns.prompt import build_prompt
from vpns.step import Learner, train_step
from vpns_kernels.convert import freeze, mask_modules, sparsify, weight_masks
from vpns_kernels.patterns import Pattern, parse_pattern

PATTERN, DENSITY, CLASSES = parse_pattern("block:16x16"), 0.4, 4


class Small(nn.Module):
    """A stem, a residual block with a stride, a 1x1 layer and a head; blocks with ragged edges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 40, 3, 2, 1, bias=False), nn.BatchNorm2d(40)
        self.shortcut, self.fc = nn.Conv2d(32, 40, 1, 2), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_predictor(stage: str, device: torch.device, pattern: Pattern = PATTERN) -> Predictor:
    """As search or tune begins."""
    torch.manual_seed(0)
    network: nn.Module = Small()
    network = attach_masks(network, pattern, unit_scores(network, pattern, torch.abs))
    refresh(network, pattern, DENSITY, "exact")
    if stage == "tune":
        network = sparsify(freeze(network), weight_masks(network), pattern).requires_grad_(True)
    prompt = build_prompt(PromptConfig(canvas=10, frame=1))
    assert prompt.raw is not None
    nn.init.normal_(prompt.raw)
    return Predictor(prompt, network).to(device).train()


def learn(predictor: Predictor, stage: str, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of one update, and everything that it changed."""
    network = predictor.network
    learned = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    # Not Adam, which takes gradients' signs: two roundings of zero may have two of them.
    optimizer = torch.optim.SGD(learned, 0.1)

    def follow() -> None:
        if stage == "search":
            refresh(network, PATTERN, DENSITY, "exact")

    label_map = LabelMap(identity_map(CLASSES, CLASSES)).to(batch.images.device)
    loss, _ = train_step(Learner(predictor, label_map, optimizer, follow), [batch])
    state = {name: tensor.detach().clone() for name, tensor in predictor.state_dict().items()}
    return loss, state


def make_batch(predictor: Predictor, device: torch.device) -> Batch:
    size = predictor.prompt.image_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images.to(device), torch.arange(4, device=device), True)


@pytest.mark.parametrize("stage", ["search", "tune"])
def test_an_iteration_is_the_dense_ones(stage: str, device: torch.device) -> None:
    plain = make_predictor(stage, device)
    batch = make_batch(plain, device)
    start = copy.deepcopy(plain.state_dict())
    fused, _ = fuse_predictor(copy.deepcopy(plain))
    set_backends(plain.network, "reference")
    set_backends(fused.network, "triton")
    expected_loss, expected = learn(plain, stage, batch)
    loss, found = learn(fused, stage, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    # A fused predictor names its tensors twice.
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=name)
    learned = "scores" if stage == "search" else "values"
    for layer in ("conv1", "conv2", "shortcut", "fc"):
        assert not torch.equal(expected[f"network.{layer}.{learned}"], start[f"network.{layer}.{learned}"])
    assert not torch.equal(expected["prompt.raw"], start["prompt.raw"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["search", "tune"])
def test_on_a_gpu_the_choice_names_the_kernels_and_an_iteration_runs(
    stage: str, device: torch.device
) -> None:
    predictor = make_predictor(stage, device)
    batch = make_batch(predictor, device)
    chosen = choose_backends(predictor, batch.images)
    assert chosen["conv2"]["backends"] == ["triton"] * 3
    assert all("no costs were measured on this GPU" in why for why in chosen["conv2"]["reasons"].values())
    fused, _ = fuse_predictor(predictor)
    set_backends(fused.network, chosen)
    loss, _ = learn(fused, stage, batch)
    assert loss > 0
    assert all(module.mask.is_cuda for module in mask_modules(predictor.network).values())
