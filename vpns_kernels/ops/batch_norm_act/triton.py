"""Triton backend: kernels and formulas stand in `_triton/batch_norm_forward.py` and `batch_norm_backward.py`.

Each way reads the activations twice: for the sums over the rows, and to write the result. torch's own batch
norm, add and ReLU read and write them up to twice as often; torch.compile fuses all that follows the
statistics as well. Which of the two is faster is left to measurement on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from vpns_kernels.ops._triton.backend import HALVES
from vpns_kernels.ops._triton.batch_norm_backward import batch_norm_act_bwd, batch_norm_sums
from vpns_kernels.ops._triton.batch_norm_forward import (
    batch_norm_act_fwd,
    batch_norm_statistics,
    batch_norm_union,
)
from vpns_kernels.ops._triton.columns import ColumnTiles, pick_tiles, sum_rows
from vpns_kernels.ops._triton.launch import Launch

# Numbers that one program of the union of splits holds of each kind.
_UNION = 8192


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, act: str
) -> str | None:
    """float32 and half activations with float32 weights."""
    if x.dtype not in (torch.float32, *HALVES) or {weight.dtype, bias.dtype} != {torch.float32}:
        return f"it takes float32 and halves with float32 weights, got {x.dtype} with {weight.dtype}"
    return None


def run(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    tiles, sizes = _tiles(x)
    mean, variance = _statistics(x, tiles, sizes)
    args = {
        "x_ptr": x,
        "residual_ptr": x if residual is None else _dense(residual),
        "y_ptr": y,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "mean_ptr": mean,
        "variance_ptr": variance,
        **sizes,
    }
    constants = {"EPS": eps, "HAS_RESIDUAL": residual is not None, "ACT": act, **tiles.constants}
    Launch(batch_norm_act_fwd, _every_tile(tiles, sizes), args, constants, tiles.warps, stages=1).run()
    return y, mean, variance


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    act: str,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual (empty without one)."""
    grad, x, y, weight = _dense(grad.to(x.dtype)), _dense(x), _dense(y), weight.contiguous()
    tiles, sizes = _tiles(x)
    channels = sizes["channels"]
    read = {"grad_ptr": grad, "x_ptr": x, "y_ptr": y}
    statistics = {"mean_ptr": mean, "variance_ptr": variance}
    settings = {"EPS": eps, "ACT": act, **tiles.constants}
    sums = torch.empty((2, tiles.splits, channels), dtype=torch.float32, device=x.device)
    Launch(
        batch_norm_sums,
        (triton.cdiv(channels, tiles.block_c), tiles.splits),
        {
            **read,
            **statistics,
            "of_grad_ptr": sums[0],
            "of_product_ptr": sums[1],
            **sizes,
            "rows_per_split": tiles.rows_per_split,
        },
        settings,
        tiles.warps,
        stages=1,
    ).run()
    grad_bias, grad_weight = sum_rows(sums[0]), sum_rows(sums[1])
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    args = {
        **read,
        "grad_x_ptr": grad_x,
        "grad_residual_ptr": grad_residual,
        "weight_ptr": weight,
        **statistics,
        "grad_bias_ptr": grad_bias,
        "grad_weight_ptr": grad_weight,
        **sizes,
    }
    constants = {**settings, "HAS_RESIDUAL": has_residual}
    Launch(batch_norm_act_bwd, _every_tile(tiles, sizes), args, constants, tiles.warps, stages=1).run()
    return grad_x, grad_weight, grad_bias, grad_residual


def _statistics(x: Tensor, tiles: ColumnTiles, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    channels = sizes["channels"]
    means, spreads = torch.empty((2, tiles.splits, channels), dtype=torch.float32, device=x.device).unbind()
    mean, variance = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    parts = {"means_ptr": means, "spreads_ptr": spreads}
    split: dict[str, Any] = {**sizes, "rows_per_split": tiles.rows_per_split}
    Launch(
        batch_norm_statistics,
        (triton.cdiv(channels, tiles.block_c), tiles.splits),
        {"x_ptr": x, **parts, **split},
        tiles.constants,
        tiles.warps,
        stages=1,
    ).run()
    block_s = triton.next_power_of_2(tiles.splits)
    block_c = min(64, _UNION // block_s)
    Launch(
        batch_norm_union,
        (triton.cdiv(channels, block_c),),
        {**parts, "mean_ptr": mean, "variance_ptr": variance, **split, "splits": tiles.splits},
        {"BLOCK_S": block_s, "BLOCK_C": block_c},
        warps=8,
        stages=1,
    ).run()
    return mean, variance


def _tiles(x: Tensor) -> tuple[ColumnTiles, dict[str, int]]:
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    return pick_tiles(rows, channels), {"rows": rows, "channels": channels}


def _every_tile(tiles: ColumnTiles, sizes: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(sizes["rows"], tiles.block_m), triton.cdiv(sizes["channels"], tiles.block_c)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
