"""What happens on a device that holds no data? An iteration, an engine and the kernels' starts are tried.

Tensors of torch's fake mode on a device of our own have sizes and a place, but no content. So what reads a
tensor's content, for which a GPU would make the host wait, stops, and so does what mixes two devices. Run by
test_other_device.py in a process of its own: the device stays registered.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.gpu.test_triton_training import DENSITY, PATTERN, make_predictor
from tests.kernels import networks
from tests.kernels.test_contract import (
    can_run,
    kept_conv2d_inputs,
    masked_conv2d_inputs,
    sparse_conv2d_fused_inputs,
    sparse_conv2d_inputs,
)
from vpns.accelerate import fuse_predictor, set_backends
from vpns.masking import refresh
from vpns.predictor import Predictor
from vpns_kernels import OPS
from vpns_kernels.engine import GpuEngine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton import (
    backend,
    block_gradients,
    block_lists,
    blocks,
    bracket,
    channel_conv,
    channel_gradients,
    channel_lists,
    kept_masks,
    taps,
)
from vpns_kernels.ops._triton import chunks as chunk_tables
from vpns_kernels.ops._triton.launch import Launch, recorded
from vpns_kernels.ops.prompt_conv2d import MEAN, STD
from vpns_kernels.patterns import parse_pattern

NAME, DEVICE = "nowhere", "nowhere:0"
# One for all: what kernels keep from call to call must not come from another.
_MODE = FakeTensorMode()
# What stands on the device, kept alive, and the tensor of the CPU that it stands for, by identity.
_originals: dict[int, tuple[Tensor, Tensor]] = {}
_packed_blocks, _packed_channels = blocks.packed_blocks, channel_lists.packed_channels


def empty_like(tensor: Tensor) -> Tensor:
    """On the device; channels_last as the original."""
    strides, shape = tensor.stride(), tuple(tensor.shape)
    moved = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=DEVICE)
    _originals[id(moved)] = (moved, tensor)
    return moved


def move(module: nn.Module) -> None:
    """Bring a module to the device, in place."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = nn.Parameter(empty_like(old), old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = empty_like(old)


def pass_through(predictor: Predictor) -> list[str]:
    """Where logits and gradients are."""
    predictor.zero_grad()
    size = predictor.prompt.image_size
    y = predictor(torch.rand(4, 3, size, size, device=DEVICE), True)
    y.square().sum().backward()
    grads = [parameter.grad for parameter in predictor.parameters() if parameter.grad is not None]
    return sorted({str(tensor.device) for tensor in (y, *grads)})


def try_training() -> dict[str, list[str]]:
    """A pass of each stage by each backend, and the masks that follow the scores."""
    found = {}
    for stage in ("search", "tune"):
        predictor = make_predictor(stage, torch.device("cpu"))
        with _MODE, recorded(lambda launch: None):
            move(predictor)
            fused, _ = fuse_predictor(predictor)
            for name in ("triton", "reference"):
                set_backends(fused.network, name)
                found[f"{stage} {name}"] = pass_through(fused)
            if stage == "search":
                chosen = refresh(fused.network, PATTERN, DENSITY, "exact")
                found["refresh"] = sorted({str(mask.device) for mask in chosen.masks})
    predictor = make_predictor("search", torch.device("cpu"), parse_pattern("channel"))
    with _MODE, recorded(lambda launch: None):
        move(predictor)
        fused, done = fuse_predictor(predictor)
        assert done["kept_channels"] == ["conv2", "shortcut"]
        found["search channels"] = pass_through(fused)
    return found


def try_engines() -> dict[str, str]:
    """Where the results of networks are, whose weights were packed before."""
    found = {}
    for name in ("residual", "vgg", "depthwise"):
        network = networks.build(name).float().eval()
        plan = draft_plan(lower(trace_network(network, torch.zeros(2, 3, 8, 8))), torch.float32, {})
        # Weights are checked on the CPU when an engine is made: only what runs is tried.
        engine = GpuEngine(plan, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True):
            found[name] = str(engine._compute(torch.empty(3, 3, 8, 8)).shape)
    return found


def try_kernels() -> dict[str, int]:
    """How many kernels all passes of each op's cases start, though nothing can be read."""
    found = {}
    for name, run in _RUNS.items():
        op, started = OPS[name], list[Launch]()
        for args in [case.build() for case in op.cases()]:
            is_empty = any(leaf.numel() == 0 for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            with _MODE, recorded(started.append):
                moved = tree_map_only(Tensor, empty_like, args)
                if not is_empty and can_run(op, moved, "triton"):
                    run(op.module("triton"), moved)
        found[name] = len(started)
    return found


def tap_table(geometry: ConvGeometry, sign: int, device: torch.device) -> tuple[Tensor, ...]:
    """As the kernels have it, made of numbers that the host knows, once for each geometry."""
    with unset_fake_temporarily():
        made = taps.tap_table(geometry, sign, torch.device("cpu"))
    return tuple(empty_like(tensor) for tensor in made)


def packed_blocks(values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry) -> blocks.PackedBlocks:
    """As the kernels have it, of a layout that the host read when it was first seen."""
    with unset_fake_temporarily():
        made = _packed_blocks(torch.zeros(values.shape), [_originals[id(t)][1] for t in layout], geometry)
        entries, counts, order = made.gradients
    moved = blocks.PackedBlocks(empty_like(made.table), geometry)
    # Where a cached property keeps what the host once read.
    moved.__dict__["gradients"] = empty_like(entries), counts, empty_like(order)
    return moved


def packed_channels(
    values: Tensor, layout: Sequence[Tensor], geometry: ConvGeometry
) -> channel_lists.PackedChannels:
    """As `packed_blocks`."""
    with unset_fake_temporarily():
        made = _packed_channels(torch.zeros(values.shape), [_originals[id(t)][1] for t in layout], geometry)
    outputs, inputs = (replace(kept, order=empty_like(kept.order)) for kept in (made.outputs, made.inputs))
    return channel_lists.PackedChannels(outputs, inputs)


def chunk_table(tensors: Sequence[Tensor], chunk: int) -> Tensor:
    """As the kernels have it, of addresses that the host knows, once for each list of tensors."""
    return _table(lambda stand_ins: chunk_tables.chunk_table(stand_ins, chunk), tensors)


def sample_table(tensors: Sequence[Tensor], count: int) -> Tensor:
    """As `chunk_table`."""
    return _table(lambda stand_ins: chunk_tables.sample_table(stand_ins, count), tensors)


def _table(make: Callable[[list[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    with unset_fake_temporarily():
        made = make([torch.zeros(shape) for shape in shapes])
    return empty_like(made)


def _sparse_conv2d(module: Any, args: dict[str, Any]) -> None:
    x, values, layout, bias, *sizes = sparse_conv2d_inputs(args)
    grad = torch.empty_like(module.run(x, values, layout, bias, *sizes))
    module.run_input_gradient(grad, x, values, layout, *sizes)
    module.run_weight_gradient(grad, x, values, layout, *sizes)


def _sparse_conv2d_fused(module: Any, args: dict[str, Any]) -> None:
    module.run(*sparse_conv2d_fused_inputs(args))


def _select_threshold(module: Any, args: dict[str, Any]) -> None:
    threshold, ties_kept = module.run(args["scores"], 1)
    module.take_kept(args["scores"], threshold, ties_kept)


def _masked_conv2d(module: Any, args: dict[str, Any]) -> None:
    inputs = masked_conv2d_inputs(args)
    grad = torch.empty_like(module.run(*inputs))
    back = (grad, *inputs[:4], *inputs[5:])
    module.run_input_gradient(*back)
    module.run_score_gradient(*back)


def _kept_conv2d(module: Any, args: dict[str, Any]) -> None:
    x, weight, bias, input_mask, output_mask, *sizes = kept_conv2d_inputs(args)
    grad = torch.empty_like(module.run(x, weight, bias, input_mask, output_mask, *sizes))
    module.run_input_gradient(grad, weight, output_mask, x.shape, *sizes)


def _channel_mask(module: Any, args: dict[str, Any]) -> None:
    inputs = args["x"], args["scores"], args["mask"]
    module.run_backward(torch.empty_like(module.run(*inputs)), *inputs, (True, True))


def _batch_norm_act(module: Any, args: dict[str, Any]) -> None:
    x, weight, bias, residual = (args[name] for name in ("x", "weight", "bias", "residual"))
    y, mean, variance = module.run(x, weight, bias, 1e-5, residual, "relu")
    grad = torch.empty_like(y)
    module.run_backward(grad, x, weight, bias, y, mean, variance, 1e-5, "relu", residual is not None)


def _prompt_conv2d(module: Any, args: dict[str, Any]) -> None:
    first = (args["image"], args["prompt"], args["weight"])
    sizes = (args["frame"], args["variant"], MEAN, STD, *astuple(args["geometry"])[3:])
    grad = torch.empty_like(module.run(*first, args["bias"], *sizes, args["dtype"]))
    wants = (args["prompt"] is not None, True, True)
    module.run_backward(grad, *first, *sizes, wants)


_RUNS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "masked_conv2d": _masked_conv2d,
    "kept_conv2d": _kept_conv2d,
    "channel_mask": _channel_mask,
    "batch_norm_act": _batch_norm_act,
    "prompt_conv2d": _prompt_conv2d,
    "sparse_conv2d": _sparse_conv2d,
    "sparse_conv2d_fused": _sparse_conv2d_fused,
    "select_threshold": _select_threshold,
}


def main() -> None:
    """Print what was tried, as JSON."""
    # The addresses of tensors without data.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    _setup_privateuseone_for_python_backend(NAME)
    backend._why_not_here = lambda tensors: None  # type: ignore[assignment]
    for module in (block_lists, block_gradients, channel_conv, channel_gradients):
        module.tap_table = tap_table  # type: ignore[attr-defined]
    blocks.packed_blocks = packed_blocks
    channel_lists.packed_channels = packed_channels
    bracket.sample_table = sample_table  # type: ignore[attr-defined]
    for module in (kept_masks, import_module("vpns_kernels.ops.select_threshold.triton")):
        module.chunk_table = chunk_table  # type: ignore[attr-defined]
    print(json.dumps({"training": try_training(), "engines": try_engines(), "kernels": try_kernels()}))


if __name__ == "__main__":
    main()
