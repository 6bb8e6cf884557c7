"""What happens on a device that holds no data? An iteration, an engine and the kernels' starts are tried.

Tensors of torch's fake mode on a device of our own have sizes and a place, but no content. So what reads a
tensor's content, for which a GPU would make the host wait, stops, and so does what mixes two devices. Run by
test_other_device.py in a process of its own: the device stays registered.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.gpu.test_triton_training import DENSITY, PATTERN, make_predictor
from tests.kernels import networks
from tests.kernels.test_contract import can_run, masked_conv2d_inputs
from vpns.accelerate import fuse_predictor, set_backends
from vpns.masking import refresh
from vpns.predictor import Predictor
from vpns_kernels import OPS
from vpns_kernels.engine import GpuEngine
from vpns_kernels.engine.lower import lower
from vpns_kernels.engine.select import draft_plan
from vpns_kernels.engine.trace import trace_network
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.ops._triton import backend, block_gradients, block_lists, taps
from vpns_kernels.ops._triton.launch import Launch, recorded
from vpns_kernels.ops.prompt_conv2d import MEAN, STD

NAME, DEVICE = "nowhere", "nowhere:0"


def empty_like(tensor: Tensor) -> Tensor:
    """On the device; channels_last as the original."""
    strides, shape = tensor.stride(), tuple(tensor.shape)
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=DEVICE)


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
        with FakeTensorMode(), recorded(lambda launch: None):
            move(predictor)
            fused, _ = fuse_predictor(predictor)
            for name in ("triton", "reference"):
                set_backends(fused.network, name)
                found[f"{stage} {name}"] = pass_through(fused)
            if stage == "search":
                chosen = refresh(fused.network, PATTERN, DENSITY, "exact")
                found["refresh"] = sorted({str(mask.device) for mask in chosen.masks})
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
            with FakeTensorMode(), recorded(started.append):
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


def _masked_conv2d(module: Any, args: dict[str, Any]) -> None:
    inputs = masked_conv2d_inputs(args)
    grad = torch.empty_like(module.run(*inputs))
    back = (grad, *inputs[:4], *inputs[5:])
    module.run_input_gradient(*back)
    module.run_score_gradient(*back)


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
    "channel_mask": _channel_mask,
    "batch_norm_act": _batch_norm_act,
    "prompt_conv2d": _prompt_conv2d,
}


def main() -> None:
    """Print what was tried, as JSON."""
    # The addresses of tensors without data.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    _setup_privateuseone_for_python_backend(NAME)
    backend._why_not_here = lambda tensors: None  # type: ignore[assignment]
    for module in (block_lists, block_gradients):
        module.tap_table = tap_table  # type: ignore[attr-defined]
    print(json.dumps({"training": try_training(), "engines": try_engines(), "kernels": try_kernels()}))


if __name__ == "__main__":
    main()
