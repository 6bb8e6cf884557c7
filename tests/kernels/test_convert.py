"""Does a network come through masking, freezing and packing with the same outputs, layers and keys?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.kernels.networks import ALL, build, images
from vpns_kernels import parse_pattern
from vpns_kernels.convert import densify, freeze, mask_layers, mask_modules, sparsify, weight_masks
from vpns_kernels.modules import MaskedConv2d, MaskedLinear
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

SPECS = ["unstructured", "block:2x3", "nm:2:4"]


def with_random_masks(network: nn.Module) -> nn.Module:
    """Half of the units masked, scores of either sign."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for module in mask_modules(network).values():
            module.scores.copy_(torch.randn(module.scores.shape, generator=generator))
            module.mask.copy_(torch.rand(module.mask.shape, generator=generator) < 0.5)
    return network


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ALL)
def test_masking_replaces_every_layer_in_place_and_changes_nothing(name: str, spec: str) -> None:
    network = build(name).eval()
    expected, before = network(images()), weights(network)
    masked = mask_layers(network, parse_pattern(spec))
    assert masked is network
    assert list(mask_modules(masked)) == list(before)
    assert all(isinstance(m, MaskedConv2d | MaskedLinear) for m in mask_modules(masked).values())
    assert all(weights(masked)[name] is weight for name, weight in before.items())
    assert torch.equal(masked(images()), expected)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ALL)
def test_a_frozen_network_is_plain_and_gives_the_same_outputs(name: str, spec: str) -> None:
    network = build(name)
    keys = list(network.state_dict())
    masked = with_random_masks(mask_layers(network, parse_pattern(spec))).eval()
    state = {key: tensor.clone() for key, tensor in masked.state_dict().items()}
    frozen = freeze(masked)
    assert list(frozen.state_dict()) == keys
    assert not mask_modules(frozen)
    assert {type(m) for m in frozen.modules() if isinstance(m, nn.Conv2d | nn.Linear)} <= {
        nn.Conv2d,
        nn.Linear,
    }
    assert not any(module.training for module in frozen.modules())
    assert torch.equal(frozen(images()), masked(images()))
    assert all(torch.equal(tensor, state[key]) for key, tensor in masked.state_dict().items())
    for layer, mask in weight_masks(masked).items():
        weight = weights(frozen)[layer]
        assert mask.shape == weight.shape
        assert torch.equal(weight, torch.where(mask, weights(masked)[layer], 0))


def test_a_frozen_network_loads_into_a_new_one() -> None:
    frozen = freeze(with_random_masks(mask_layers(build("residual"), parse_pattern("block:2x3")))).eval()
    other = build("residual").eval()
    other.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(other(images()), frozen(images()))


def test_a_layer_that_stands_in_two_places_is_masked_in_both() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    masked = mask_layers(network, parse_pattern("unstructured"))
    assert masked[0] is masked[2]
    with torch.no_grad():
        masked[0].mask.fill_(False)
    y = masked(torch.randn(1, 3, 5, 5))
    assert bool((y == shared.bias.view(1, 3, 1, 1)).all())
    frozen = freeze(masked)
    assert frozen[0] is frozen[2]
    sparse = sparsify(frozen)
    assert sparse[0] is sparse[2]
    assert isinstance(sparse[0], SparseConv2d)
    assert isinstance(densify(sparse)[2], nn.Conv2d)


def test_a_single_layer_is_a_network_too() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    expected = layer(x)
    masked = mask_layers(layer, parse_pattern("unstructured"))
    assert isinstance(masked, MaskedLinear)
    assert torch.equal(masked(x), expected)
    assert type(freeze(masked)) is nn.Linear
    assert isinstance(sparsify(layer, {"": layer.weight > 0}), SparseLinear)


@pytest.mark.parametrize("name", ALL)
def test_a_sparse_network_equals_the_plain_one_and_comes_back_to_the_last_bit(name: str) -> None:
    masked = with_random_masks(mask_layers(build(name), parse_pattern("unstructured"))).eval()
    frozen = freeze(masked)
    for sparse in (sparsify(frozen), sparsify(frozen, weight_masks(masked))):
        assert {type(sparse.get_submodule(n)) for n in weights(frozen)} <= {SparseConv2d, SparseLinear}
        with torch.no_grad():
            torch.testing.assert_close(sparse(images()), frozen(images()))
        dense = densify(sparse)
        assert not any(module.training for module in dense.modules())
        state = dense.state_dict()
        assert list(state) == list(frozen.state_dict())
        assert all(torch.equal(state[key], tensor) for key, tensor in frozen.state_dict().items())


def test_sparsify_packs_what_has_a_mask_in_the_pattern_and_dtype_asked_for() -> None:
    network = build("vgg").eval().float()
    pattern = parse_pattern("block:2x2")
    shapes = {"3": (10, 6, 3, 3), "8": (16, 40)}
    units = {name: torch.rand(pattern.units_shape(shape)) < 0.5 for name, shape in shapes.items()}
    masks = {name: pattern.expand(units[name], shape) for name, shape in shapes.items()}
    sparse = sparsify(network, masks, pattern, torch.bfloat16)
    assert type(sparse[0]) is nn.Conv2d
    for place in (3, 8):
        assert sparse[place].pattern == pattern
        assert sparse[place].values.dtype == torch.bfloat16
        assert sparse[place].values.dim() == 3
    assert type(network[3]) is nn.Conv2d


def test_a_network_without_zeros_stays_dense() -> None:
    network = build("residual").eval()
    sparse = sparsify(network)
    assert all(type(sparse.get_submodule(name)) in (nn.Conv2d, nn.Linear) for name in weights(network))
    assert torch.equal(sparse(images()), network(images()))


def test_masks_that_do_not_fit_are_refused() -> None:
    network = build("vgg")
    with pytest.raises(ValueError, match=r"sparsify: expected masks of .*, got \['1', 'nothing'\]"):
        sparsify(network, {"nothing": torch.ones(1), "1": torch.ones(1)})
    with pytest.raises(ValueError, match="pack: expected a bool mask"):
        sparsify(network, {"0": torch.ones(6, 3, 3, 2, dtype=torch.bool)})


@pytest.mark.parametrize("spec", [*SPECS, "channel"])
def test_a_model_without_layers_is_refused(spec: str) -> None:
    with pytest.raises(
        ValueError, match="mask_layers: expected a model with Conv2d or Linear layers, got Seq"
    ):
        mask_layers(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), parse_pattern(spec))


@pytest.mark.parametrize("spec", [*SPECS, "channel"])
def test_a_masked_network_is_neither_masked_again_nor_packed(spec: str) -> None:
    masked = mask_layers(build("residual"), parse_pattern(spec))
    with pytest.raises(ValueError, match="mask_layers: expected a plain model, got masked"):
        mask_layers(masked, parse_pattern("unstructured"))
    with pytest.raises(ValueError, match="sparsify: expected a plain network, got a masked one"):
        sparsify(masked)


def test_a_layer_with_a_forward_of_its_own_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MultiheadAttention(4, 2))
    before = copy.deepcopy(network)
    with pytest.raises(NotImplementedError, match=r"got NonDynamicallyQuantizableLinear at '1\.out_proj'"):
        mask_layers(network, parse_pattern("unstructured"))
    assert str(network) == str(before)


@pytest.mark.parametrize("spec", ["unstructured", "block:4x4"])
def test_packed_layers_train_under_distributed_data_parallel(tmp_path: Path, spec: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    pattern = parse_pattern(spec)
    masks = {
        name: pattern.expand(torch.rand(pattern.units_shape(tuple(w.shape))) < 0.5, tuple(w.shape))
        for name, w in (("0", plain[0].weight), ("3", plain[3].weight))
    }
    sparse, x = sparsify(plain, masks, pattern), torch.randn(4, 3, 6, 6)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(sparse)
        wrapped(x).square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in sparse.named_parameters()}
        # Before its group, whose last owner waits for threads while it holds the lock that they need.
        del wrapped
    finally:
        dist.destroy_process_group()
    sparse.zero_grad()
    sparse(x).square().sum().backward()
    for name, parameter in sparse.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@pytest.mark.parametrize("spec", ["block:8x8", "channel"])
def test_grouped_convolutions_that_a_pattern_cannot_hold_are_packed_unstructured(spec: str) -> None:
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), depthwise, nn.Conv2d(16, 8, 1))
    masks = {"1": torch.zeros_like(depthwise.weight, dtype=torch.bool)}
    masks["1"][::2] = True
    packed = sparsify(plain, masks, parse_pattern(spec))
    layer = packed.get_submodule("1")
    assert isinstance(layer, SparseConv2d)
    assert layer.values.dim() == 1
    x = torch.randn(2, 3, 9, 9)
    plain[1].weight.data.mul_(masks["1"])
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-5)
