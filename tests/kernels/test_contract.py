"""One suite for all ops: every op × backend × case meets the op's contract.

A new backend or case is tested by being there; this file changes when an op is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch

import vpns_kernels
from vpns_kernels import OPS, unpack
from vpns_kernels.ops.case import Case
from vpns_kernels.ops.prompt_conv2d import MEAN, STD
from vpns_kernels.ops.prompt_conv2d.canvas import compose, normalise, to_unit, wide_dtype
from vpns_kernels.testing import conv_excess, poisoned_memory

ROWS = [
    pytest.param(op, backend, case, id=f"{op.name}-{backend}-{case.name}")
    for op in OPS.values()
    for backend in op.backends
    for case in op.cases()
]


def check_select_threshold(args: dict[str, Any], result: Any) -> None:
    """Exactly `kept` entries: those above the threshold and `ties_kept` of those equal to it."""
    threshold, ties_kept, kept = result
    magnitude = torch.cat([tensor.flatten() for tensor in args["scores"]]).abs()
    assert kept == max(1, int(args["density"] * magnitude.numel() + 0.5))
    above, equal = int((magnitude > threshold).sum()), int((magnitude == threshold).sum())
    assert above + int(ties_kept) == kept
    assert 1 <= int(ties_kept) <= equal


def check_sparse_conv2d(args: dict[str, Any], y: Any) -> None:
    """Within the error bound, in the input's dtype, channels_last."""
    weight = unpack(args["values"], args["layout"], args["geometry"])
    assert y.dtype == args["x"].dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv_excess(y, args["x"], weight, args["bias"], args["geometry"]) <= 1


def check_sparse_conv2d_fused(args: dict[str, Any], y: Any) -> None:
    """Within the error bound of sums that are rounded once, in the dtype asked for, channels_last."""
    weight = unpack(args["values"], args["layout"], args["geometry"])
    residual, act = args.get("residual"), args["act"]
    assert y.dtype == (args["out_dtype"] or args["x"].dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv_excess(y, args["x"], weight, args["bias"], args["geometry"], residual, act) <= 1


def check_batch_norm_act(args: dict[str, Any], result: Any) -> None:
    """As torch's in float64, to the rounding of y's dtype and of float32 sums."""
    y, mean, variance = result
    x = args["x"].double()
    scale = (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt() * args["weight"].double()
    truth = torch.nn.functional.batch_norm(
        x, None, None, args["weight"].double(), args["bias"].double(), training=True
    )
    if args["residual"] is not None:
        truth = truth + args["residual"].double()
    truth = {"none": lambda t: t, "relu": torch.relu, "relu6": torch.nn.functional.relu6}[args["act"]](truth)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # A mean in float32 carries an error of its own size times the roundoff, which the scale multiplies.
    roundoff = 4 * torch.finfo(mean.dtype).eps * (1 + x.abs().amax() * (1 + scale.abs().amax()))
    bound = torch.finfo(y.dtype).eps * truth.abs() + roundoff
    assert bool(((y.double() - truth).abs() <= bound).all())
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), x.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-7)


def check_prompt_conv2d(args: dict[str, Any], y: Any) -> None:
    """Within the error bound of a convolution of the canvas as the reference composes it, channels_last."""
    dtype = args["dtype"]
    canvas = compose(
        to_unit(args["image"], wide_dtype(dtype)), args["prompt"], args["frame"], args["variant"]
    )
    x = normalise(canvas, MEAN, STD).to(dtype)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv_excess(y, x, args["weight"].to(dtype), args["bias"], args["geometry"]) <= 1


def check_channel_mask(args: dict[str, Any], y: Any) -> None:
    """The very numbers of x, or zero."""
    x, mask = args["x"], args["mask"]
    memory = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=memory)
    assert torch.equal(y, x * mask.view(1, -1, *(1,) * (x.dim() - 2)))


def check_masked_conv2d(args: dict[str, Any], y: Any) -> None:
    """Within the error bound of the masked weight as it is rounded to x's dtype, channels_last."""
    x, weight, bias = args["x"], args["weight"], args["bias"]
    weight = (weight * args["pattern"].expand(args["mask"], tuple(weight.shape))).to(x.dtype)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The reference rounds the bias as torch does.
    biases = {None} if bias is None else {bias, bias.to(x.dtype)}
    assert min(conv_excess(y, x, weight, bias, args["geometry"]) for bias in biases) <= 1


def check_kept_conv2d(args: dict[str, Any], y: Any) -> None:
    """Within the error bound of the weight as it is rounded to x's dtype, channels_last."""
    x, weight, bias = args["x"], args["weight"].to(args["x"].dtype), args["bias"]
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Torch rounds the bias too.
    biases = {None} if bias is None else {bias, bias.to(x.dtype)}
    assert min(conv_excess(y, x, weight, bias, args["geometry"]) for bias in biases) <= 1


CHECKS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "batch_norm_act": check_batch_norm_act,
    "prompt_conv2d": check_prompt_conv2d,
    "channel_mask": check_channel_mask,
    "kept_conv2d": check_kept_conv2d,
    "masked_conv2d": check_masked_conv2d,
    "select_threshold": check_select_threshold,
    "sparse_conv2d": check_sparse_conv2d,
    "sparse_conv2d_fused": check_sparse_conv2d_fused,
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def run(name: str, args: dict[str, Any], backend: str) -> Any:
    return getattr(vpns_kernels, name)(**args, backend=backend)


def masked_conv2d_inputs(args: dict[str, Any]) -> tuple[Any, ...]:
    """The schema's arguments without the backends."""
    g, tensors = args["geometry"], (args[name] for name in ("x", "weight", "mask", "scores", "bias"))
    return (*tensors, args["pattern"].spec, g.stride, g.padding, g.dilation, g.groups)


def kept_conv2d_inputs(args: dict[str, Any]) -> tuple[Any, ...]:
    """The schema's arguments without the backend."""
    g, names = args["geometry"], ("x", "weight", "bias", "input_mask", "output_mask")
    return (*(args[name] for name in names), g.stride, g.padding, g.dilation, g.groups)


def sparse_conv2d_inputs(args: dict[str, Any]) -> tuple[Any, ...]:
    """The schema's arguments without the backends."""
    g, tensors = args["geometry"], (args[name] for name in ("x", "values", "layout", "bias"))
    return (*tensors, g.weight_shape, g.stride, g.padding, g.dilation, g.groups)


def sparse_conv2d_fused_inputs(args: dict[str, Any]) -> tuple[Any, ...]:
    """The schema's arguments without the backend."""
    x, values, layout, bias, *sizes = sparse_conv2d_inputs(args)
    out_dtype = args["out_dtype"] or x.dtype
    return (x, values, layout, bias, args.get("residual"), *sizes, args["act"], out_dtype)


def can_run(op: Any, args: dict[str, Any], backend: str) -> bool:
    inputs = {
        "batch_norm_act": lambda: (args["x"], args["weight"], args["bias"], 1e-5, args["residual"], "none"),
        "prompt_conv2d": lambda: (
            args["image"],
            args["prompt"],
            args["weight"],
            args["bias"],
            args["frame"],
            args["variant"],
            MEAN,
            STD,
            *astuple(args["geometry"])[3:],
            args["dtype"],
        ),
        "channel_mask": lambda: (args["x"], args["scores"], args["mask"]),
        "kept_conv2d": lambda: kept_conv2d_inputs(args),
        "masked_conv2d": lambda: masked_conv2d_inputs(args),
        "select_threshold": lambda: (args["scores"], 1),
        "sparse_conv2d": lambda: sparse_conv2d_inputs(args),
        "sparse_conv2d_fused": lambda: sparse_conv2d_fused_inputs(args),
    }
    return op.module(backend).why_not(*inputs[op.name]()) is None


def test_every_op_has_a_check_and_cases() -> None:
    assert set(CHECKS) == set(OPS)
    assert all(op.cases() for op in OPS.values())


@pytest.mark.parametrize(("op", "backend", "case"), ROWS)
def test_backend_meets_the_contract_or_says_why_it_cannot(op: Any, backend: str, case: Case) -> None:
    args = case.build()
    if can_run(op, args, backend):
        CHECKS[op.name](args, run(op.name, args, backend))
    else:
        assert backend != "reference"
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this: .*'reference'"):
            run(op.name, args, backend)


@pytest.mark.parametrize(("op", "backend", "case"), ROWS)
def test_inputs_are_left_as_they_were(op: Any, backend: str, case: Case) -> None:
    args, again = case.build(), case.build()
    if can_run(op, args, backend):
        run(op.name, args, backend)
    leaves, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (args, again))
    for leaf, original in zip(leaves, expected, strict=True):
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_an_unknown_backend_is_refused(op: Any) -> None:
    with pytest.raises(ValueError, match="expected backend in"):
        run(op.name, op.cases()[0].build(), "fpga")


@pytest.mark.parametrize(("op", "case"), [row.values[::2] for row in ROWS if row.values[1] == "cpu"])
def test_native_results_are_bitwise_equal_for_one_and_two_threads(op: Any, case: Case) -> None:
    args, threads = case.build(), torch.get_num_threads()
    if not can_run(op, args, "cpu"):
        return
    try:
        torch.set_num_threads(1)
        expected = torch.utils._pytree.tree_leaves(run(op.name, args, "cpu"))
        for count in (2, 1):
            torch.set_num_threads(count)
            found = torch.utils._pytree.tree_leaves(run(op.name, args, "cpu"))
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    finally:
        torch.set_num_threads(threads)
