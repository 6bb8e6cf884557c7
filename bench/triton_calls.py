"""Which calls of the ops start Triton's kernels? Every pass of every layer of the lists in bench/layers.

The tensors are true in shape, dtype and layout and hold nothing: only the starts are recorded. What a backend
refuses stands with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import OPS, pack, parse_pattern
from vpns_kernels.measure.layers import Layer, read_layers
from vpns_kernels.ops._triton.launch import Launch, recorded
from vpns_kernels.ops.prompt_conv2d import MEAN, STD
from vpns_kernels.patterns import Channel

ARCHS = (80, 90)
LISTS = Path(__file__).resolve().parent / "layers"
# By name: the type of activations, and whether float32 products may be taken as TF32.
DTYPES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}
HALVES = ("bfloat16", "float16")
PATTERNS = ("block:64x64", "block:32x32", "channel")
# Convolutions: their products belong on tensor cores.
MAIN = ("sparse_conv2d", "sparse_conv2d_fused", "masked_conv2d", "kept_conv2d", "prompt_conv2d")
DENSITY, FRAME = 0.1, 16
Request = tuple[str, str, tuple[Any, ...], str | None]


@dataclass(frozen=True)
class Call:
    """One pass of one op on one layer: what it starts, or why it does not."""

    op: str
    pass_name: str
    layer: str
    dtype: str
    pattern: str
    arch: int
    launches: tuple[Launch, ...] = ()
    refusal: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether its products must run on tensor cores, without spilling."""
        return self.op in MAIN and self.dtype in HALVES


def distinct_layers(names: Sequence[str] = ("resnet18", "resnet50", "vgg16")) -> list[Layer]:
    """The layers of the lists, each size once, named after the first network that has it."""
    found: dict[Any, Layer] = {}
    for name in names:
        for layer in read_layers(LISTS / f"{name}.txt"):
            renamed = Layer(f"{name}.{layer.name}", layer.geometry, layer.height, layer.width)
            found.setdefault((layer.geometry, layer.height, layer.width), renamed)
    return list(found.values())


def ops_with_triton() -> list[str]:
    """Names of the ops that have a Triton backend; ValueError where this file knows no calls of one."""
    names = [name for name, op in OPS.items() if "triton" in op.backends]
    unknown = sorted(set(names) - set(_REQUESTS))
    if unknown:
        raise ValueError(
            f"ops_with_triton: expected ops in {sorted(_REQUESTS)}, got {unknown}: add its calls"
        )
    return names


def calls(
    ops: Sequence[str],
    layers: Sequence[Layer],
    dtypes: Sequence[str] = tuple(DTYPES),
    patterns: Sequence[str] = PATTERNS,
    archs: Sequence[int] = ARCHS,
    batch: int = 128,
) -> Iterator[Call]:
    """Every call of the ops on the layers, recorded for each architecture.

    Args:
        patterns: for those ops that know any.
    """
    for op in ops:
        for layer in layers:
            for dtype in dtypes:
                for pattern in patterns if op in _PATTERNED else ("",):
                    for pass_name, method, args, refusal in _REQUESTS[op](layer, dtype, pattern, batch):
                        for arch in archs:
                            started = () if refusal else _record(op, method, args, dtype, arch)
                            yield Call(op, pass_name, layer.name, dtype, pattern, arch, started, refusal)


def _record(op: str, method: str, args: tuple[Any, ...], dtype: str, arch: int) -> tuple[Launch, ...]:
    launches: list[Launch] = []
    precision = torch.backends.cudnn.flags(allow_tf32=DTYPES[dtype][1])
    with recorded(launches.append, arch // 10), precision, torch.no_grad():
        getattr(_module(op), method)(*args)
    return tuple(launches)


def _module(op: str) -> Any:
    """The backend itself: what stands before it would ask for a GPU."""
    return import_module(f"vpns_kernels.ops.{op}.triton")


def _refusal(op: str, args: tuple[Any, ...], question: str = "why_not") -> str | None:
    module = _module(op)
    reason: str | None = module.why_not(*args)
    if reason is None and hasattr(module, question):
        reason = getattr(module, question)(*args)
    return reason


def _sparse(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    x, y = _activations(layer, dtype, batch)
    for values, layout in _packed(layer, DTYPES[dtype][0], pattern):
        sizes = _sizes(layer, has_shape=True)
        args = (x, values, layout, None, *sizes)
        yield "forward", "run", args, _refusal("sparse_conv2d", args)
        for name, method, question in (
            ("input gradient", "run_input_gradient", "why_no_input_gradient"),
            ("weight gradient", "run_weight_gradient", "why_no_weight_gradient"),
        ):
            yield name, method, (y, x, values, layout, *sizes), _refusal("sparse_conv2d", args, question)


def _sparse_fused(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    x, y = _activations(layer, dtype, batch)
    bias = x.new_zeros(layer.geometry.out_channels)
    for values, layout in _packed(layer, x.dtype, pattern):
        for name, residual, act in (("bias, relu", None, "relu"), ("bias, residual, relu", y, "relu")):
            args = (x, values, layout, bias, residual, *_sizes(layer, has_shape=True), act, x.dtype)
            yield name, "run", args, _refusal("sparse_conv2d_fused", args)


def _masked(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    x, y = _activations(layer, dtype, batch)
    weight = torch.zeros(layer.geometry.weight_shape)
    mask = _units(layer, pattern)
    scores = torch.zeros(mask.shape)
    args = (x, weight, mask, scores, None, pattern, *_sizes(layer))
    yield "forward", "run", args, _refusal("masked_conv2d", args)
    for name, method, question in (
        ("input gradient", "run_input_gradient", "why_no_input_gradient"),
        ("score gradient", "run_score_gradient", "why_no_weight_gradient"),
    ):
        given = (y, x, weight, mask, scores, pattern, *_sizes(layer))
        yield name, method, given, _refusal("masked_conv2d", args, question)


def _kept(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    if layer.is_linear:
        return
    x, y = _activations(layer, dtype, batch)
    weight = torch.zeros(layer.geometry.weight_shape)
    output_mask, input_mask = (_draw((count,)) for count in weight.shape[:2])
    args = (x, weight, None, input_mask, output_mask, *_sizes(layer))
    refusal = _refusal("kept_conv2d", args)
    yield "forward", "run", args, refusal
    given = (y, weight, output_mask, x.shape, *_sizes(layer))
    yield "input gradient", "run_input_gradient", given, refusal


def _prompt(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    """A layer whose input is a canvas: of an image with a frame around it, or with a prompt upon it."""
    g = layer.geometry
    if g.in_channels != 3:
        return
    kind, (H, W) = DTYPES[dtype][0], (layer.height, layer.width)
    prompt, weight = torch.zeros(3, H, W), torch.zeros(g.weight_shape)
    grad = _channels_last((batch, g.out_channels, *g.output_size(H, W)), kind)
    for variant, ring in (("framed", FRAME), ("released", 0)):
        image = torch.empty(batch, 3, H - 2 * ring, W - 2 * ring, dtype=torch.uint8)
        settings = (FRAME, variant, list(MEAN), list(STD), *_sizes(layer))
        args = (image, prompt, weight, None, *settings, kind)
        yield f"{variant} forward", "run", args, _refusal("prompt_conv2d", args)
        for name, question, wants in (
            ("prompt gradient", "why_no_input_gradient", (True, False, False)),
            ("weight gradient", "why_no_weight_gradient", (False, True, True)),
        ):
            given = (grad, image, prompt, weight, *settings, wants)
            yield f"{variant} {name}", "run_backward", given, _refusal("prompt_conv2d", args, question)


def _batch_norm(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    if layer.is_linear:
        return
    _, x = _activations(layer, dtype, batch)
    channel = torch.zeros(x.shape[1])
    for name, residual, act in (
        ("none", None, "none"),
        ("relu", None, "relu"),
        ("residual, relu", x, "relu"),
    ):
        args = (x, channel, channel, 1e-5, residual, act)
        refusal = _refusal("batch_norm_act", args)
        yield f"{name} forward", "run", args, refusal
        given = (x, x, channel, channel, x, channel, channel, 1e-5, act, residual is not None)
        yield f"{name} backward", "run_backward", given, refusal


def _channel_mask(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    _, x = _activations(layer, dtype, batch)
    scores, mask = torch.zeros(x.shape[1]), torch.ones(x.shape[1], dtype=torch.bool)
    args = (x, scores, mask)
    refusal = _refusal("channel_mask", args)
    yield "forward", "run", args, refusal
    yield "backward", "run_backward", (x, x, scores, mask, (True, True)), refusal


def _selection(layer: Layer, dtype: str, pattern: str, batch: int) -> Iterator[Request]:
    """Scores are float32 whatever the activations are; one tensor stands for a network's."""
    if DTYPES[dtype] == (torch.float32, False):
        scores = torch.zeros(layer.geometry.weight_shape)
        args = ([scores, scores], max(1, round(DENSITY * 2 * scores.numel())))
        refusal = _refusal("select_threshold", args)
        yield "selection", "run", args, refusal
        cut = ([scores, scores], torch.zeros(()), torch.zeros((), dtype=torch.int64))
        yield "masks", "take_kept", cut, refusal


_REQUESTS: dict[str, Callable[[Layer, str, str, int], Iterator[Request]]] = {
    "sparse_conv2d": _sparse,
    "sparse_conv2d_fused": _sparse_fused,
    "masked_conv2d": _masked,
    "kept_conv2d": _kept,
    "prompt_conv2d": _prompt,
    "batch_norm_act": _batch_norm,
    "channel_mask": _channel_mask,
    "select_threshold": _selection,
}
_PATTERNED = ("sparse_conv2d", "sparse_conv2d_fused", "masked_conv2d")


def _activations(layer: Layer, dtype: str, batch: int) -> tuple[Tensor, Tensor]:
    """What goes in and what comes out, channels_last; memory that nobody writes costs nothing."""
    g, kind = layer.geometry, DTYPES[dtype][0]
    x = _channels_last((batch, g.in_channels, layer.height, layer.width), kind)
    return x, _channels_last((batch, g.out_channels, *g.output_size(layer.height, layer.width)), kind)


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def _sizes(layer: Layer, has_shape: bool = False) -> tuple[Any, ...]:
    g = layer.geometry
    sizes = (g.stride, g.padding, g.dilation, g.groups)
    return (g.weight_shape, *sizes) if has_shape else sizes


def _units(layer: Layer, spec: str) -> Tensor:
    return _draw(parse_pattern(spec).units_shape(layer.geometry.weight_shape))


def _draw(shape: tuple[int, ...]) -> Tensor:
    rank = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return rank < max(DENSITY, float(rank.min()) + 1e-6)


@lru_cache(maxsize=1)
def _packed(layer: Layer, dtype: torch.dtype, spec: str) -> list[tuple[Tensor, list[Tensor]]]:
    """Packed weights of a pattern; of channels, that read or write all of them too."""
    pattern, weight = parse_pattern(spec), torch.zeros(layer.geometry.weight_shape, dtype=dtype)
    masks = [pattern.expand(_units(layer, spec), layer.geometry.weight_shape)]
    if isinstance(pattern, Channel):
        inputs = pattern.expand(_draw((weight.shape[1],)), (weight.shape[1], weight.shape[0], 1, 1))
        inputs = inputs.transpose(0, 1).expand_as(weight)
        masks += [inputs, inputs & masks[0]]
    found = [pack(weight, mask.contiguous(), pattern, layer.geometry) for mask in masks]
    return [(packed.values, list(packed.layout)) for packed in found]
