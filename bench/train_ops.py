"""What do the ops around the convolutions cost in training, ours against what torch offers?

prompt_conv2d against cast + pad or add + clamp + normalise + convolve, batch_norm_act against batch norm, add
and ReLU, select_threshold and refresh_mask against cat + abs + kthvalue as published.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.train_memory import status_mb
from bench.train_published import MEAN, STD, lay_over
from vpns_kernels.geometry import ConvGeometry, PromptGeometry
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import Laps, Sample, add_up, compare, interleave, interleave_phases
from vpns_kernels.ops import batch_norm_act, prompt_conv2d
from vpns_kernels.ops.select_threshold import select_threshold
from vpns_kernels.patterns import Unstructured
from vpns_kernels.refresh import refresh_mask

DTYPES = ("float32", "bfloat16")
Row = dict[str, Any]


def bench_prompt(
    geometry: ConvGeometry, variant: str, batch: int, canvas: int, frame: int, rounds: int
) -> Row:
    """Forward, prompt gradient and weight gradient of uint8 images; extra memory of the first two."""
    size = canvas if variant == "released" else canvas - 2 * frame
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    prompt = torch.randn(3, canvas, canvas, generator=generator)
    weight = torch.randn(geometry.weight_shape, generator=generator) * 0.05
    weight = weight.contiguous(memory_format=torch.channels_last)
    mask = PromptGeometry(canvas, frame).frame_mask().float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def ours(dtype: torch.dtype, count: int = batch) -> Tensor:
        return prompt_conv2d(image[:count], prompt, weight, geometry, frame, variant, dtype=dtype)

    def theirs(dtype: torch.dtype) -> Tensor:
        pixels = lay_over(image.float() / 255, prompt, mask, variant, frame)
        x = ((pixels - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight.to(dtype), None, geometry.stride, geometry.padding)

    made = {"ours": ours, "torch": theirs}
    for dtype in (getattr(torch, name) for name in DTYPES):
        _expect_equal(f"prompt_conv2d {variant}", ours(dtype), theirs(torch.float32), dtype)
    calls = {
        f"{who} {name}": _passes(lambda make=make, name=name: make(getattr(torch, name)), prompt, weight)  # type: ignore[misc]
        for who, make in made.items()
        for name in DTYPES
    }
    samples = interleave_phases(calls, rounds)
    extra = {name: extra_mb(partial(ours, getattr(torch, name)), batch, prompt) for name in DTYPES}
    return {
        "op": "prompt_conv2d",
        "case": f"{variant}, uint8 {size} px on {canvas}, frame {frame}, batch {batch}",
        "variant": variant,
        "canvas": canvas,
        "batch": batch,
        **_rows_of(samples),
        "canvas_mb": batch * 3 * canvas * canvas * 4 / 1e6,
        "extra_mb": extra,
    }


def _passes(make: Callable[[], Tensor], prompt: Tensor, weight: Tensor) -> Callable[[Laps], None]:
    def run(laps: Laps) -> None:
        for learned, phase in ((prompt, "prompt_gradient"), (weight, "weight_gradient")):
            learned.requires_grad_(True)
            laps.skip()
            y = make()
            if learned is prompt:
                laps.mark("forward")
            grad = torch.ones_like(y)
            laps.skip()
            torch.autograd.grad(y, learned, grad)
            laps.mark(phase)
            learned.requires_grad_(False)

    return run


def extra_mb(make: Callable[[int], Tensor], batch: int, prompt: Tensor) -> dict[str, float] | None:
    """Peak memory of forward and prompt gradient beyond the output; None where Linux does not tell.

    What one image takes (libraries that get ready, threads) does not count, what a batch takes more does.
    """
    if not _reset_peak():
        return None
    prompt.requires_grad_(True)
    y = make(1)
    torch.autograd.grad(y, prompt, torch.ones_like(y))
    before = _settled_mb()
    y = make(batch)
    forward = status_mb("VmHWM") - before - y.numel() * y.element_size() / 1e6
    grad = torch.ones_like(y)
    before = _settled_mb()
    torch.autograd.grad(y, prompt, grad)
    backward = status_mb("VmHWM") - before
    prompt.requires_grad_(False)
    return {"forward": max(0.0, forward), "prompt_gradient": max(0.0, backward)}


def _settled_mb() -> float:
    """What is resident once freed memory went back to the system, from where the peak is counted anew."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    _reset_peak()
    return status_mb("VmRSS")


def _reset_peak() -> bool:
    """Let the kernel count this process's peak anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def bench_batch_norm(channels: int, size: int, batch: int, dtype: str, rounds: int) -> Row:
    """Forward and backward with residual and ReLU, channels_last."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, size, size)

    def draw() -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        return drawn.contiguous(memory_format=torch.channels_last).requires_grad_(True)

    x, residual, grad = draw(), draw(), draw().detach()
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    learned = (x, residual, weight, bias)

    def ours() -> Tensor:
        return batch_norm_act(x, weight, bias, residual=residual, act="relu")[0]

    def theirs() -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return torch.relu_(y + residual)

    def both(make: Callable[[], Tensor]) -> Callable[[Laps], None]:
        def run(laps: Laps) -> None:
            laps.skip()
            y = make()
            laps.mark("forward")
            torch.autograd.grad(y, learned, grad)
            laps.mark("backward")

        return run

    _expect_equal("batch_norm_act", ours(), theirs(), getattr(torch, dtype))
    samples = interleave_phases({"ours": both(ours), "torch": both(theirs)}, rounds)
    case = f"{channels} channels at {size} px, batch {batch}, {dtype}"
    return {"op": "batch_norm_act", "case": case, **_rows_of(samples)}


def bench_refresh(layers: Sequence[Layer], density: float, rounds: int) -> Row:
    """The threshold of a network's scores, and its masks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [layer.geometry.weight_shape for layer in layers for _ in range(layer.count)]
    scores = [torch.randn(shape, generator=generator) for shape in shapes]
    total = sum(tensor.numel() for tensor in scores)
    pruned = int((1 - density) * total)

    def published() -> Tensor:
        return torch.cat([tensor.abs().flatten() for tensor in scores]).kthvalue(pruned).values

    def published_masks() -> list[Tensor]:
        tau = published()
        return [tensor.abs() > tau for tensor in scores]

    def threshold() -> object:
        return select_threshold(scores, kept=total - pruned)

    def masks() -> list[Tensor]:
        return refresh_mask(scores, Unstructured(), density, "published").masks

    if not all(map(torch.equal, masks(), published_masks())):
        raise RuntimeError("bench_refresh: expected the published masks, got others")
    calls = {
        "torch.kthvalue": published,
        "torch.kthvalue and masks": published_masks,
        "select_threshold": threshold,
        "refresh_mask": masks,
    }
    samples = interleave(calls, rounds, warmup=1)
    pairs = {"select_threshold": "torch.kthvalue", "refresh_mask": "torch.kthvalue and masks"}
    return {
        "op": "select_threshold",
        "scores": total,
        "case": f"{total:,} scores, density {density:g}",
        "arms": {name: {"total": sample.to_dict()} for name, sample in samples.items()},
        "ratios": {
            mine: {other: {"total": _ratio(samples[other], samples[mine])}} for mine, other in pairs.items()
        },
    }


def _rows_of(samples: dict[str, dict[str, Sample]]) -> Row:
    """Figures of every arm by phase and in total, and the ratios of ours to each of torch's."""
    whole = {name: phases | {"total": add_up(phases)} for name, phases in samples.items()}
    ours = [name for name in whole if name.startswith("ours")]
    theirs = [name for name in whole if name not in ours]
    return {
        "arms": {name: {p: s.to_dict() for p, s in phases.items()} for name, phases in whole.items()},
        "ratios": {
            mine: {other: {p: _ratio(whole[other][p], s) for p, s in whole[mine].items()} for other in theirs}
            for mine in ours
        },
    }


def _ratio(slow: Sample, fast: Sample) -> dict[str, float]:
    return asdict(compare(slow, fast))


def _expect_equal(what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """A figure of a wrong result is worth nothing."""
    found, wanted = found.detach().float(), wanted.detach().float()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]:
        raise RuntimeError(f"{what}: expected torch's outputs, got a relative error of {error}")
