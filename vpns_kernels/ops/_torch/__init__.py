"""What backends made of torch's own operators share."""

from vpns_kernels.ops._torch.compact import convolve_compact
from vpns_kernels.ops._torch.epilogue import ACTS, finish, sum_dtype

__all__ = ["ACTS", "convolve_compact", "finish", "sum_dtype"]
