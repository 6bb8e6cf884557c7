"""What backends made of torch's own operators share."""

from vpns_kernels.ops._torch.autocast import autocast_input
from vpns_kernels.ops._torch.channels import take_channels
from vpns_kernels.ops._torch.compact import convolve_compact
from vpns_kernels.ops._torch.epilogue import ACTS, finish, sum_dtype
from vpns_kernels.ops._torch.gradients import compact_input_gradient, compact_weight_gradient
from vpns_kernels.ops._torch.plain import is_plain

__all__ = [
    "ACTS",
    "autocast_input",
    "compact_input_gradient",
    "compact_weight_gradient",
    "convolve_compact",
    "finish",
    "is_plain",
    "sum_dtype",
    "take_channels",
]
