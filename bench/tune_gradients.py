"""What `bench.tune --gradients` times of a cell: weight gradients, of kept weights, of scores and dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from vpns_kernels.choose import query_of
from vpns_kernels.choose_training import all_scores
from vpns_kernels.cost import LayerQuery
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.measure.layer_bench import Variant, make_mask, make_sparse, make_weight
from vpns_kernels.measure.layers import Layer
from vpns_kernels.ops import _cpu
from vpns_kernels.ops.masked_conv2d import cpu as masked_conv2d
from vpns_kernels.ops.masked_conv2d import reference
from vpns_kernels.patterns import parse_pattern


def gradient_calls(
    layer: Layer, x: Tensor, densities: Sequence[float]
) -> Iterator[tuple[str, LayerQuery, float, Callable[[], Tensor]]]:
    """(row of the cost table, query, density, call) of each weight gradient for inputs like x."""
    image = x if x.dim() == 4 else x.reshape(*x.shape, 1, 1)
    image = image.contiguous(memory_format=torch.channels_last)
    g, name = layer.geometry, dtype_name(x.dtype)
    size = (image.shape[0], *image.shape[2:])
    grad = torch.randn(image.shape[0], g.out_channels, *g.output_size(*image.shape[2:])).to(x.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight = make_weight(layer)
    shape, sizes = g.weight_shape, (g.stride, g.padding, g.dilation, g.groups)
    query = LayerQuery(g, size, (0,), name, "float32")
    yield f"dense weight gradient {name}", query, 1.0, lambda: conv2d_weight(image, shape, grad, *sizes)
    if g.groups == 1:
        yield from _score_calls(g, image, grad, weight.weight.detach().view(shape))
    for spec in ("unstructured", "block:32x32"):
        for density in densities:
            if g.groups > 1 and spec != "unstructured":
                continue
            variant = Variant(parse_pattern(spec), density, torch.float32)
            sparse = make_sparse(weight, make_mask(layer, weight, variant), variant)
            values, layout = sparse.values.detach(), sparse.layout
            query = query_of(g, image.shape, values, x.dtype)
            row = f"gradient {query.format}" + (f" {name}" if query.format == "block" else "")
            yield row, query, density, lambda v=values, a=layout: _cpu.weight_gradient(grad, image, v, a, g)  # type: ignore[misc]


def _score_calls(
    g: ConvGeometry, image: Tensor, grad: Tensor, weight: Tensor
) -> Iterator[tuple[str, LayerQuery, float, Callable[[], Tensor]]]:
    """Scores of all single weights and of all blocks."""
    name, sizes = dtype_name(image.dtype), (g.stride, g.padding, g.dilation, g.groups)
    dense = (grad, image, weight, weight > 0, weight, "unstructured", *sizes)
    query = LayerQuery(g, (image.shape[0], *image.shape[2:]), (0,), name, "float32")
    yield f"dense scores {name}", query, 1.0, lambda: reference.run_score_gradient(*dense)
    for spec in ("unstructured", "block:32x32"):
        scores = torch.randn(parse_pattern(spec).units_shape(g.weight_shape))
        kept = torch.empty(0) if spec == "unstructured" else torch.empty(0, 32, 32)
        query = query_of(g, image.shape, kept, image.dtype)
        args = (grad, image, weight, scores > 0, scores, spec, *sizes)
        row = f"score {query.format} {name}"
        yield row, all_scores(query), 1.0, lambda a=args: masked_conv2d.run_score_gradient(*a)  # type: ignore[misc]
