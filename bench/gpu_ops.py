"""What do the ops around the convolutions cost on a GPU? The prompted stem, the threshold, batch norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_targets import CUDNN
from bench.train_published import MEAN, STD, lay_over
from vpns_kernels.geometry import ConvGeometry, PromptGeometry
from vpns_kernels.measure.gpu import interleave_recorded
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import compare
from vpns_kernels.ops import OPS, batch_norm_act, prompt_conv2d

Row = dict[str, Any]


def bench_gpu_prompt(
    geometry: ConvGeometry,
    variant: str,
    batch: int,
    canvas: int,
    frame: int,
    device: torch.device,
    rounds: int,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> Row:
    """Forward and prompt gradient of uint8 images together, against torch's operations one by one."""
    size = canvas if variant == "released" else canvas - 2 * frame
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8, device=device)
    prompt = torch.randn(3, canvas, canvas, generator=generator, device=device).requires_grad_()
    weight = torch.randn(geometry.weight_shape, generator=generator, device=device) * 0.05
    weight = weight.contiguous(memory_format=torch.channels_last)
    mask = PromptGeometry(canvas, frame).frame_mask().float().to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def ours() -> Tensor:
        return prompt_conv2d(image, prompt, weight, geometry, frame, variant, dtype=dtype, backend=backend)

    def theirs() -> Tensor:
        pixels = lay_over(image.float() / 255, prompt, mask, variant, frame)
        x = ((pixels - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight.to(dtype), None, geometry.stride, geometry.padding)

    grad = torch.randn_like(theirs())

    def both(make: Callable[[], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(make(), prompt, grad)
        return found

    samples = interleave_recorded({"ours": partial(both, ours), CUDNN: partial(both, theirs)}, rounds, device)
    # Images twice, once for each pass; outputs written, their gradient read.
    least_mb = (2 * image.numel() + 2 * grad.numel() * grad.element_size()) / 1e6
    return {
        "op": "prompt_conv2d",
        "case": f"{variant}, uint8 {size} px on {canvas}, frame {frame}, batch {batch}",
        "backend": backend,
        "ours": samples["ours"].to_dict(),
        "dense": {CUDNN: samples[CUDNN].to_dict()},
        "ratios": {CUDNN: asdict(compare(samples[CUDNN], samples["ours"]))},
        "least_mb": least_mb,
    }


def bench_gpu_selection(
    layers: Sequence[Layer], density: float, device: torch.device, rounds: int, backends: Sequence[str]
) -> list[Row]:
    """A row for each backend over a network's scores, against cat, abs and kthvalue."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [layer.geometry.weight_shape for layer in layers for _ in range(layer.count)]
    scores = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    total = sum(tensor.numel() for tensor in scores)
    kept = max(1, int(density * total + 0.5))
    op = OPS["select_threshold"]

    def published() -> Tensor:
        return torch.cat([tensor.abs().flatten() for tensor in scores]).kthvalue(total - kept + 1).values

    truth = float(published())
    calls: dict[str, Callable[[], object]] = {"torch.kthvalue": published}
    for backend in backends:
        module = op.module(op.resolve(backend, scores, kept))
        found = float(module.run(scores, kept)[0])
        if found != truth:
            raise RuntimeError(f"bench_gpu_selection: expected {truth} of {backend}, got {found}")
        calls[backend] = partial(module.run, scores, kept)
    samples = interleave_recorded(calls, rounds, device)
    return [
        {
            "op": "select_threshold",
            "case": f"{total:,} scores, density {density:g}",
            "scores": total,
            "backend": backend,
            "ours": samples[backend].to_dict(),
            "dense": {"torch.kthvalue": samples["torch.kthvalue"].to_dict()},
            "ratios": {"torch.kthvalue": asdict(compare(samples["torch.kthvalue"], samples[backend]))},
            "least_mb": 4e-6 * total,
        }
        for backend in backends
    ]


def bench_gpu_batch_norm(
    channels: int,
    size: int,
    batch: int,
    device: torch.device,
    rounds: int,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> Row:
    """Forward and backward of batch norm, residual add and ReLU, against torch's three operations."""
    shape = (batch, channels, size, size)
    generator = torch.Generator(device).manual_seed(0)
    x, residual, grad = (
        torch.randn(shape, device=device, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    learned = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]

    def ours() -> Tensor:
        return batch_norm_act(x, weight, bias, 1e-5, residual, "relu", backend)[0]

    def theirs() -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5) + residual)

    def both(make: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(make(), learned, grad)

    samples = interleave_recorded({"ours": partial(both, ours), CUDNN: partial(both, theirs)}, rounds, device)
    return {
        "op": "batch_norm_act",
        "case": f"{channels} channels at {size}, residual and ReLU, batch {batch}",
        "backend": backend,
        "ours": samples["ours"].to_dict(),
        "dense": {CUDNN: samples[CUDNN].to_dict()},
        "ratios": {CUDNN: asdict(compare(samples[CUDNN], samples["ours"]))},
        # Forward: x twice, residual, y; backward: x, y and their gradient twice, two gradients written.
        "least_mb": 12 * x.numel() * x.element_size() / 1e6,
    }
