"""Do sparse and masked layers hold where torch is used in its less common ways?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vpns_kernels import (
    ConvGeometry,
    batch_norm_act,
    channel_mask,
    kept_conv2d,
    masked_conv2d,
    pack,
    parse_pattern,
    prompt_conv2d,
    sparse_conv2d,
    sparse_conv2d_fused,
)
from vpns_kernels.convert import densify, sparsify
from vpns_kernels.modules import MaskedConv2d, MaskedLinear
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

GEOMETRY = ConvGeometry(16, 8, (3, 3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def frozen_layer(kernel: str = "") -> tuple[nn.Conv2d, SparseConv2d]:
    """A pruned convolution and its sparse twin, in evaluation mode, without gradients."""
    conv = nn.Conv2d(16, 8, 3).eval().requires_grad_(False)
    conv.weight.copy_(draw(8, 16, 3, 3) * (draw(8, 16, 3, 3, seed=1) > 0.8))
    return conv, SparseConv2d.from_dense(conv, kernel=kernel)


def pruned(layer: nn.Conv2d | nn.Linear) -> nn.Sequential:
    """A network of one layer whose first output has no weights."""
    with torch.no_grad():
        layer.weight[0] = 0
    return nn.Sequential(layer).eval()


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def _other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_other_default")
def test_torchs_default_dtype_changes_nothing() -> None:
    x, scores = draw(2, 512, 3, 3), draw(512, seed=1).requires_grad_()
    channel_mask(x, scores, scores.detach() > 0).sum().backward()
    torch.testing.assert_close(scores.grad, scores.detach().sign() * x.sum((0, 2, 3)))
    image, weight = draw(1, 3, 6, 6).sigmoid(), draw(4, 3, 3, 3, seed=2)
    prompt, found = draw(3, 6, 6, seed=3).requires_grad_(), []
    for backend in ("auto", "reference"):
        y = prompt_conv2d(image, prompt, weight, ConvGeometry(3, 4, (3, 3)), 1, "released", backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), prompt)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_torchs_default_device_changes_nothing() -> None:
    conv, layer = frozen_layer("sparse")
    with torch.device("meta"):
        found, cold = layer(draw(2, 16, 8, 8)), SparseConv2d.from_dense(conv)(draw(2, 16, 8, 8))
    for y in (found, cold):
        torch.testing.assert_close(y, conv(draw(2, 16, 8, 8)))


@torch.no_grad()
def test_tensors_that_are_negated_lazily_have_their_own_sign() -> None:
    conv = nn.Conv2d(1, 4, 3, bias=False).eval()
    layer = SparseConv2d.from_dense(conv, kernel="sparse")
    z = torch.complex(draw(1, 1, 5, 5), draw(1, 1, 5, 5, seed=1)).conj().imag
    assert z.is_neg()
    torch.testing.assert_close(layer(z), conv(z))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_transforms_and_counters_see_an_op() -> None:
    conv, layer = frozen_layer()
    x, other = draw(2, 16, 8, 8), draw(2, 16, 8, 8, seed=5)
    layer(x)
    torch.testing.assert_close(torch.func.functionalize(layer)(x), conv(x))
    torch.testing.assert_close(make_fx(layer)(x)(other), conv(other))
    torch.testing.assert_close(torch.jit.trace(layer, x)(other), conv(other))
    with FlopCounterMode(display=False):
        torch.testing.assert_close(layer(other), conv(other))


def jvp(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The derivative along ones, in forward mode."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_derivatives_are_refused_not_zero() -> None:
    x, weight, mask = draw(2, 16, 8, 8), draw(8, 16, 3, 3), draw(8, 16, 3, 3, seed=1) > 0
    pattern, ones = parse_pattern("unstructured"), torch.ones(16)
    packed = pack(weight, mask, pattern, GEOMETRY)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse_conv2d": lambda x: sparse_conv2d(x, packed.values, packed.layout, GEOMETRY),
        "sparse_conv2d_fused": lambda x: sparse_conv2d_fused(x, packed.values, packed.layout, GEOMETRY),
        "masked_conv2d": lambda x: masked_conv2d(x, weight, mask, weight, GEOMETRY, pattern),
        "kept_conv2d": lambda x: kept_conv2d(x, weight, ones > 0, GEOMETRY),
        "channel_mask": lambda x: channel_mask(x, ones, ones > 0),
        "batch_norm_act": lambda x: batch_norm_act(x, ones, ones)[0],
        "layer": frozen_layer()[1],
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match="in reverse mode, got a request for forward"):
            jvp(call, x)
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
        assert call(x).isfinite().all(), name


class Standardised(nn.Conv2d):
    """Computes with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_with_a_forward_of_their_own_stay_dense_or_are_refused() -> None:
    network, x = pruned(Standardised(16, 8, 3)), draw(2, 16, 8, 8)
    torch.testing.assert_close(sparsify(network)(x), network(x))
    with pytest.raises(NotImplementedError, match="got Standardised with its own"):
        sparsify(network, {"0": torch.ones(8, 16, 3, 3, dtype=torch.bool)})
    for layer, name in ((nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d"), (nn.Linear(4, 4), "Linear")):
        with pytest.raises(TypeError, match=f"expected a Conv2d, got {name}"):
            SparseConv2d.from_dense(layer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(4, 4, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
@torch.no_grad()
def test_attention_keeps_the_weights_that_it_reads(kind: Callable[..., nn.Module]) -> None:
    network = kind(16, 2, batch_first=True).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight[::2] = 0
    x = draw(2, 5, 16)
    given = (x, x, x) if isinstance(network, nn.MultiheadAttention) else (x,)
    torch.testing.assert_close(sparsify(network)(*given), network(*given))


def test_hooks_go_with_their_layers_there_and_back() -> None:
    network, x = pruned(nn.Conv2d(16, 8, 3)), draw(2, 16, 8, 8)
    network[0].register_forward_hook(lambda module, args, y: 2 * y)
    network[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    sparse = sparsify(network)
    assert isinstance(sparse.get_submodule("0"), SparseConv2d)
    for twin in (sparse, densify(sparse)):
        torch.testing.assert_close(twin(x), network(x), rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    network[2].weight = network[0].weight
    with torch.no_grad():
        network[0].weight[0] = 0
    sparse = sparsify(network)
    assert sparse.get_submodule("0").values is sparse.get_submodule("2").values
    assert len(list(sparse.parameters())) == len(list(network.parameters())) == 3


def test_shared_values_are_compared_as_another_process_may_change_them() -> None:
    _, layer = frozen_layer("sparse")
    x = draw(2, 16, 8, 8)
    layer.share_memory()
    for shared in (copy.deepcopy(layer).eval(), layer):
        shared(x)
        # As another process changes them: no version counts up.
        shared.values.data.zero_()
        assert shared.bias is not None
        torch.testing.assert_close(shared(x), shared.bias.view(1, -1, 1, 1).expand(2, 8, 6, 6))


def test_integers_are_refused_and_weights_are_not_cut_to_them() -> None:
    linear = MaskedLinear.from_dense(nn.Linear(16, 8), parse_pattern("unstructured"))
    linear.weight.requires_grad_(False)
    whole = torch.ones(2, 16, 8, 8, dtype=torch.int64)
    weight, pattern = draw(8, 16, 3, 3), parse_pattern("unstructured")
    packed = pack(weight, weight > 0, pattern, GEOMETRY)
    calls: tuple[Callable[[], object], ...] = (
        lambda: linear(torch.arange(16)),
        lambda: sparse_conv2d(whole, packed.values, packed.layout, GEOMETRY),
        lambda: masked_conv2d(whole, weight, weight > 0, weight, GEOMETRY, pattern),
        lambda: kept_conv2d(whole, weight, torch.ones(16) > 0, GEOMETRY),
        lambda: batch_norm_act(whole, torch.ones(16), torch.ones(16)),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"expected x of a floating dtype, got torch\.int64"):
            call()


@pytest.mark.parametrize("backend", ["reference", "compact"])
def test_backends_keep_the_dtype_of_x_under_autocast(backend: str) -> None:
    kept = torch.ones(8, 16, 3, 3, dtype=torch.bool)
    kept[3] = False
    packed, x = pack(draw(8, 16, 3, 3), kept, parse_pattern("channel"), GEOMETRY), draw(2, 16, 8, 8)
    for op in (sparse_conv2d, sparse_conv2d_fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = op(x, packed.values, packed.layout, GEOMETRY, backend=backend)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, op(x, packed.values, packed.layout, GEOMETRY, backend=backend))


def test_a_float32_bias_gets_a_float32_gradient_of_half_outputs() -> None:
    bias = torch.zeros(8, requires_grad=True)
    weight = draw(8, 16, 3, 3)
    packed = pack(weight, weight > 0, parse_pattern("unstructured"), GEOMETRY)
    x = draw(16, 16, 40, 40).half()
    sparse_conv2d(x, packed.values.half(), packed.layout, GEOMETRY, bias).sum().mul(8).backward()
    # Beyond what float16 can hold.
    torch.testing.assert_close(bias.grad, torch.full((8,), 8.0 * 16 * 38 * 38))


def test_batch_norm_refuses_what_it_would_compute_badly() -> None:
    x, ones = draw(2, 4, 3, 3), torch.ones(4)
    for given, eps, message in (
        ((x.double(), ones, ones), 1e-5, "expected weight torch.float64"),
        ((x, ones, ones.double()), 1e-5, "expected bias torch.float32"),
        ((x.half(), ones.half(), ones.half()), 1e-5, "expected weight torch.float32"),
        ((x, ones, ones), 0.0, "expected eps above 0"),
        ((x, ones, ones), float("nan"), "expected eps above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            batch_norm_act(*given, eps=eps)


def test_a_mask_that_does_not_fit_is_refused_whether_weights_learn_or_not() -> None:
    for learns in (True, False):
        layer = MaskedConv2d.from_dense(nn.Conv2d(16, 16, 3), parse_pattern("block:8x8"))
        layer.weight.requires_grad_(learns)
        for mask in (torch.full_like(layer.scores.detach(), 0.5), torch.ones(9, 9, 3, 3) > 0):
            layer.mask = mask
            with pytest.raises((ValueError, TypeError), match="mask"):
                layer(draw(1, 16, 8, 8))


def test_one_image_one_channel_and_meta_tensors_pass_as_in_torch() -> None:
    conv, layer = frozen_layer("sparse")
    torch.testing.assert_close(layer(draw(16, 8, 8)), conv(draw(16, 8, 8)))
    masked = MaskedConv2d.from_dense(nn.Conv2d(1, 8, 3), parse_pattern("unstructured"))
    masked.weight.requires_grad_(False)
    assert masked(draw(4, 1, 8, 8)).view(4, -1).shape == (4, 8 * 6 * 6)
    assert layer.to("meta")(draw(2, 16, 8, 8).to("meta")).shape == (2, 8, 6, 6)
    assert masked.to("meta")(draw(4, 1, 8, 8).to("meta")).shape == (4, 8, 6, 6)


def test_what_was_packed_in_bfloat16_is_dense_in_the_type_of_its_bias() -> None:
    network, x = pruned(nn.Conv2d(16, 8, 3)), draw(2, 16, 8, 8)
    plain = densify(sparsify(network, dtype=torch.bfloat16))
    torch.testing.assert_close(plain(x), network(x), rtol=0.02, atol=0.02)


def test_a_layout_that_was_averaged_like_weights_is_refused() -> None:
    kept = torch.ones(64, 64, 3, 3, dtype=torch.bool)
    kept[::3], kept[:, ::5] = False, False
    layer = SparseConv2d.from_dense(nn.Conv2d(64, 64, 3), kept, "channel").eval().requires_grad_(False)
    averaged, x = copy.deepcopy(layer), draw(1, 64, 8, 8)
    torch.testing.assert_close(averaged(x), layer(x))
    for mine, new in zip(averaged.parameters(), layer.parameters(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * new)
    torch.testing.assert_close(averaged(x), layer(x))
    for mine, new in zip(averaged.state_dict().values(), layer.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * new)
    with pytest.raises(ValueError, match=r"written over in place \(average parameters alone"):
        averaged(x)
    other = (
        SparseConv2d.from_dense(nn.Conv2d(64, 64, 3), kept.flip(0), "channel").eval().requires_grad_(False)
    )
    averaged.load_state_dict(other.state_dict())
    torch.testing.assert_close(averaged(x), other(x))


def test_a_mask_that_cuts_within_a_block_is_refused_as_its_rest_would_learn() -> None:
    mask = torch.ones(16, 16, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    with pytest.raises(ValueError, match="got one that cuts within a unit"):
        SparseConv2d.from_dense(nn.Conv2d(16, 16, 3), mask, "block:16x16")
