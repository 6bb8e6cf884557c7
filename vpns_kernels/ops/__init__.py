"""The ops: each folder holds a door, a dense reference, cases and backends."""

from vpns_kernels.ops.batch_norm_act import batch_norm_act
from vpns_kernels.ops.channel_mask import channel_mask
from vpns_kernels.ops.kept_conv2d import kept_conv2d
from vpns_kernels.ops.masked_conv2d import masked_conv2d, masked_linear
from vpns_kernels.ops.prompt_conv2d import prompt_conv2d
from vpns_kernels.ops.registry import OPS, Op
from vpns_kernels.ops.select_threshold import select_threshold
from vpns_kernels.ops.sparse_conv2d import sparse_conv2d
from vpns_kernels.ops.sparse_conv2d_fused import sparse_conv2d_fused

__all__ = [
    "OPS",
    "Op",
    "batch_norm_act",
    "channel_mask",
    "kept_conv2d",
    "masked_conv2d",
    "masked_linear",
    "prompt_conv2d",
    "select_threshold",
    "sparse_conv2d",
    "sparse_conv2d_fused",
]
