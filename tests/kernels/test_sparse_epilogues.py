"""Do packed layers add, activate and fold batch norms as the dense ones do?"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels.pruned_layers import (
    DTYPES,
    SPECS,
    prune,
    pruned_conv,
)
from vpns_kernels import parse_pattern, runners
from vpns_kernels.choose import Choice
from vpns_kernels.folding import fold_batch_norm
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear


@pytest.fixture(autouse=True)
def _sparse_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers would run dense; here kernels are tested, in test_choose.py the choice."""
    choice = Choice("", 1.0, 1.0, "as the op chooses", ())
    monkeypatch.setattr(runners, "choose", lambda *_, **__: choice)


ACTS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_residual_and_activation_follow_the_sums_and_are_rounded_once(
    spec: str, dtype: torch.dtype, act: str
) -> None:
    conv, mask = pruned_conv(spec, dtype)
    layer = SparseConv2d.from_dense(conv, mask, parse_pattern(spec), act=act)
    x, residual = torch.randn(9, 24, 6, 6).to(dtype), 4 * torch.randn(9, 16, 6, 6).to(dtype)
    with torch.no_grad():
        y, alone = layer(x, residual), layer(x)
        truth = conv.double()(x.double())
    for found, sums in ((y, truth + residual.double()), (alone, truth)):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        tolerance = torch.finfo(dtype).eps / 2 + 2e-6
        torch.testing.assert_close(found.double(), ACTS[act](sums), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
def test_a_linear_layer_takes_residual_and_activation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(9)
    linear = nn.Linear(24, 10)
    layer = SparseLinear.from_dense(linear, prune(linear, "unstructured"), act="relu")
    x, residual = torch.randn(shape), torch.randn(*shape[:-1], 10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, residual), F.relu(linear(x) + residual))
        with pytest.raises(ValueError, match=r"SparseLinear: expected residual .*10\], got"):
            layer(x, torch.randn(*shape[:-1], 9))


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("spec", SPECS)
def test_residual_and_activation_are_differentiable(spec: str, act: str) -> None:
    conv, mask = pruned_conv(spec, torch.float64)
    layer = SparseConv2d.from_dense(conv, mask, parse_pattern(spec), act=act)
    x = torch.randn(2, 24, 6, 6, dtype=torch.float64)
    residual = 4 * torch.randn(2, 16, 6, 6, dtype=torch.float64)
    grads = []
    for run in (lambda a, b: layer(a, b), lambda a, b: ACTS[act](conv(a) + b)):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        run(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_copy_keeps_activation_dtype_and_kernel(twin_of: Any, dtype: torch.dtype) -> None:
    conv, mask = pruned_conv("unstructured")
    layer = SparseConv2d.from_dense(conv, mask, dtype=dtype, kernel="scalar", act="relu6")
    x, residual = torch.randn(2, 24, 6, 6).to(dtype), torch.randn(2, 16, 6, 6).to(dtype)
    with torch.no_grad():
        expected = layer(x, residual)
        twin = twin_of(layer)
        assert (twin.act, twin.kernel, twin.values.dtype) == ("relu6", "scalar", dtype)
        assert torch.equal(twin(x, residual), expected)
        fresh = SparseConv2d.from_dense(conv, mask, dtype=dtype, kernel="scalar", act="relu6")
        fresh.values.zero_()
        fresh.load_state_dict(twin.state_dict())
        assert torch.equal(fresh(x, residual), expected)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_batch_norm_is_folded_into_weight_and_bias(
    spec: str, dtype: torch.dtype, affine: bool, has_bias: bool
) -> None:
    conv, mask = pruned_conv(spec, bias=has_bias)
    bn = nn.BatchNorm2d(16, affine=affine)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2.0)
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        with torch.no_grad():
            # Scaled by zero is not pruned: the bias alone remains, and training could bring it back.
            bn.weight[3] = 0.0
    bn.eval()
    before = copy.deepcopy(conv.state_dict())
    with torch.no_grad():
        for layer in (
            SparseConv2d.from_dense(conv, mask, parse_pattern(spec), dtype, act="relu", bn=bn),
            SparseConv2d.from_dense(conv, None, None, dtype, act="relu", bn=bn),
        ):
            layer.to(dtype)
            x = torch.randn(3, 24, 6, 6).to(dtype)
            truth = F.relu(bn.double()(conv.double()(x.double())))
            bn.float()
            conv.float()
            tolerance = 1e-2 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(layer(x).double(), truth, rtol=tolerance, atol=tolerance)
        assert int(mask.sum()) == layer.values.numel()
        folded = fold_batch_norm(conv, bn)
        torch.testing.assert_close(folded(x.float()), bn(conv(x.float())))
    torch.testing.assert_close(conv.state_dict(), before, rtol=0, atol=0)


def test_a_batch_norm_after_a_linear_layer_is_folded() -> None:
    torch.manual_seed(9)
    linear, bn = nn.Linear(24, 10), nn.BatchNorm1d(10)
    mask = prune(linear, "unstructured")
    bn(torch.randn(50, 10) * 3 + 1)
    layer = SparseLinear.from_dense(linear, mask, bn=bn.eval())
    x = torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), bn(linear(x)))


def test_a_batch_norm_that_cannot_be_folded_is_refused() -> None:
    conv, _ = pruned_conv("unstructured")
    for bn, message in (
        (nn.BatchNorm2d(16), r"expected evaluation mode, got training \(call bn.eval\(\) first\)"),
        (nn.BatchNorm2d(15).eval(), "expected 16 channels, got 15"),
        (nn.BatchNorm2d(16, track_running_stats=False).eval(), "expected running statistics, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            fold_batch_norm(conv, bn)
