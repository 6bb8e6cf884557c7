"""What do a layer's three passes cost in training, ours against torch's three oneDNN calls?

Ours pays what a step pays: between any two rounds all values change (tuning) or the mask moves (search), so
that packing and preparing are in the figures of the pass that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.train_sparseprop import over_sparseprop, sparseprop_passes
from vpns_kernels.formats import pack
from vpns_kernels.measure.layer_bench import Variant, make_input, make_mask, make_weight
from vpns_kernels.measure.layers import Layer
from vpns_kernels.measure.timing import Laps, Sample, compare, interleave_phases
from vpns_kernels.ops import masked_conv2d, sparse_conv2d
from vpns_kernels.patterns import Pattern, parse_pattern

PASSES = ("forward", "input_gradient", "weight_gradient")
# What part of the mask's kept units moves between two steps of search.
_MOVED_FRAC = 0.01
# A result further from dense than this share of the largest is no rounding.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to train a layer.

    Args:
        stage: "tune" (packed weights, gradients of the kept ones) or "search" (a mask, gradients of scores).
        dtype: of activations; weights and scores are float32.
    """

    stage: str
    pattern: str
    density: float
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.stage} {self.pattern} density {self.density:g} {self.dtype}"


@dataclass(frozen=True, eq=False)
class _Trained:
    """A layer's own part of a pass.

    Args:
        learned: what its weight gradient is of.
        renew: what a step changes; not timed.
        expected_gradient: of `learned`, from the dense weight's.
    """

    convolve: Callable[[Tensor, Tensor], Tensor]
    learned: Tensor
    renew: Callable[[], None]
    expected_gradient: Callable[[Tensor], Tensor]
    mask: Tensor


def bench_passes(layer: Layer, batch: int, forms: Sequence[Form], rounds: int) -> list[Row]:
    """A row for each form, all timed in turn with torch in both dtypes.

    Raises:
        RuntimeError: a form whose outputs or gradients are not the layer's.
    """
    x, weight = _image(layer, make_input(layer, batch)), make_weight(layer).weight.detach()
    weight = weight.reshape(layer.geometry.weight_shape).contiguous(memory_format=torch.channels_last)
    shape = (batch, layer.geometry.out_channels, *layer.geometry.output_size(layer.height, layer.width))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grad = grad.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[Laps], object]] = {}
    for dtype in ("float32", "bfloat16"):
        tensors = [tensor.to(getattr(torch, dtype)) for tensor in (x, weight, grad)]
        calls[f"torch {dtype}"] = _dense_passes(layer, *tensors)
    backends: dict[str, list[str]] = {}
    densities = {}
    for form in forms:
        trained = _build(layer, form, weight)
        dtype = getattr(torch, form.dtype)
        given = (x.to(dtype), grad.to(dtype))
        backends[form.name] = _check(layer, form, trained, weight, *given)
        densities[form.name] = float(trained.mask.float().mean())
        calls[form.name] = _our_passes(trained, *given)
        if (form.stage, form.pattern, form.dtype) == ("tune", "unstructured", "float32"):
            rival = sparseprop_passes(layer, weight * trained.mask, x, grad)
            calls |= {} if rival is None else {f"sparseprop {form.name}": rival}
    samples = interleave_phases(calls, rounds)
    dense = {dtype: samples[f"torch {dtype}"] for dtype in ("float32", "bfloat16")}
    return [
        {
            "layer": layer.name,
            "count": layer.count,
            "kernel_size": list(layer.geometry.kernel_size),
            "stride": layer.geometry.stride[0],
            "in_channels": layer.geometry.in_channels,
            "out_channels": layer.geometry.out_channels,
            "height": layer.height,
            "batch": batch,
            "stage": form.stage,
            "pattern": form.pattern,
            "density": form.density,
            "weight_density": densities[form.name],
            "dtype": form.dtype,
            "backends": backends[form.name],
            "ours": _to_dict(samples[form.name]),
            "torch": {dtype: _to_dict(found) for dtype, found in dense.items()},
            "ratios": {dtype: _ratios(found, samples[form.name]) for dtype, found in dense.items()},
            "sparseprop": over_sparseprop(samples.get(f"sparseprop {form.name}"), samples[form.name]),
        }
        for form in forms
    ]


def _to_dict(phases: dict[str, Sample]) -> dict[str, dict[str, float]]:
    return {name: phases[name].to_dict() for name in PASSES}


def _ratios(slow: dict[str, Sample], fast: dict[str, Sample]) -> dict[str, dict[str, float]]:
    found = {name: compare(slow[name], fast[name]) for name in PASSES}
    return {name: asdict(ratio) for name, ratio in found.items()}


def _image(layer: Layer, x: Tensor) -> Tensor:
    return x.reshape(*x.shape, 1, 1) if layer.is_linear else x


def _dense_passes(layer: Layer, x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[Laps], None]:
    """Torch's three calls on dense weights, already in their dtype."""
    if layer.is_linear:
        flat, matrix, back = x.flatten(1), weight.flatten(1), grad.flatten(1)

        def run_linear(laps: Laps) -> None:
            laps.skip()
            F.linear(flat, matrix)
            laps.mark("forward")
            back @ matrix
            laps.mark("input_gradient")
            back.t() @ flat
            laps.mark("weight_gradient")

        return run_linear
    g = layer.geometry

    def backward(*wants: bool) -> object:
        sizes = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, list(wants))

    def run(laps: Laps) -> None:
        laps.skip()
        F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)
        laps.mark("forward")
        backward(True, False, False)
        laps.mark("input_gradient")
        backward(False, True, False)
        laps.mark("weight_gradient")

    return run


def _our_passes(trained: _Trained, x: Tensor, grad: Tensor) -> Callable[[Laps], None]:
    """Each gradient through autograd, as a step takes it; the second forward is not timed."""

    def run(laps: Laps) -> None:
        trained.renew()
        laps.skip()
        _differentiate(trained, x, x, grad, laps, "input_gradient")
        laps.skip()
        _differentiate(trained, x, trained.learned, grad, laps, "weight_gradient")

    return run


def _differentiate(
    trained: _Trained, x: Tensor, of: Tensor, grad: Tensor, laps: Laps, phase: str
) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of one of the inputs; the forward counts where x is that input."""
    of.requires_grad_(True)
    y = trained.convolve(x, trained.learned)
    if of is x:
        laps.mark("forward")
    else:
        laps.skip()
    (found,) = torch.autograd.grad(y, of, grad)
    laps.mark(phase)
    of.requires_grad_(False)
    return y, found


def _check(layer: Layer, form: Form, trained: _Trained, weight: Tensor, x: Tensor, grad: Tensor) -> list[str]:
    """A figure of a wrong result is worth nothing; returns who computed the passes."""
    g, wide = layer.geometry, x.float().requires_grad_(True)
    masked = (weight * trained.mask).requires_grad_(True)
    expected = F.conv2d(wide, masked, None, g.stride, g.padding, g.dilation, g.groups)
    expected_grads = torch.autograd.grad(expected, (wide, masked), grad.float())
    y, grad_x = _differentiate(trained, x, x, grad, Laps(), "")
    _, grad_learned = _differentiate(trained, x, trained.learned, grad, Laps(), "")
    pairs = {
        "forward": (y, expected),
        "input_gradient": (grad_x, expected_grads[0]),
        "weight_gradient": (grad_learned, trained.expected_gradient(expected_grads[1])),
    }
    for name, (found, wanted) in pairs.items():
        error = float((found.detach().float() - wanted.detach()).abs().max() / wanted.detach().abs().max())
        if not error <= _TOLERANCE[form.dtype]:
            raise RuntimeError(
                f"bench_passes: expected the {name} of {layer.name}, {form.name}, "
                f"got a relative error of {error}"
            )
    return list(getattr(y.grad_fn, "backends", []))


def _build(layer: Layer, form: Form, weight: Tensor) -> _Trained:
    pattern = parse_pattern(form.pattern)
    mask = make_mask(layer, layer.build(), Variant(pattern, form.density, torch.float32))
    mask = mask.reshape(layer.geometry.weight_shape)
    return (_build_sparse if form.stage == "tune" else _build_masked)(layer, pattern, weight, mask)


def _build_sparse(layer: Layer, pattern: Pattern, weight: Tensor, mask: Tensor) -> _Trained:
    geometry = layer.geometry
    packed = pack(weight, mask, pattern, geometry)

    def convolve(x: Tensor, values: Tensor) -> Tensor:
        return sparse_conv2d(x, values, packed.layout, geometry)

    def renew() -> None:
        with torch.no_grad():
            packed.values.mul_(1.0)

    def expected(grad: Tensor) -> Tensor:
        return pack(grad, mask, pattern, geometry).values

    return _Trained(convolve, packed.values, renew, expected, mask)


def _build_masked(layer: Layer, pattern: Pattern, weight: Tensor, mask: Tensor) -> _Trained:
    kept = pattern.reduce_sum(mask.float()) > 0
    scores = torch.randn(kept.shape, generator=torch.Generator().manual_seed(4))
    others, place = (kept.clone(), _move(kept)), [0]

    def convolve(x: Tensor, learned: Tensor) -> Tensor:
        return masked_conv2d(x, weight, kept, learned, layer.geometry, pattern)

    def renew() -> None:
        place[0] = 1 - place[0]
        kept.copy_(others[place[0]])

    def expected(grad: Tensor) -> Tensor:
        return scores.sign() * pattern.reduce_sum(weight * grad)

    return _Trained(convolve, scores, renew, expected, mask)


def _move(kept: Tensor) -> Tensor:
    """As many units, a few of them others."""
    flat = kept.flatten().clone()
    on, off = flat.nonzero().flatten(), (~flat).nonzero().flatten()
    count = min(max(1, int(_MOVED_FRAC * len(on))), len(on), len(off))
    flat[on[:count]], flat[off[:count]] = False, True
    return flat.view_as(kept)
