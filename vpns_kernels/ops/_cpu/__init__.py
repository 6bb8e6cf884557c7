"""What the cpu backends share: a packed weight in the order of the native kernel that runs it."""

from vpns_kernels.ops._cpu.cache import PreparedCache, input_gradient, prepared_for, weight_gradient
from vpns_kernels.ops._cpu.gradients import InputGradient, WeightGradient, why_no_weight_gradient
from vpns_kernels.ops._cpu.prepared import Prepared, multiplied_dtype, why_not

__all__ = [
    "InputGradient",
    "Prepared",
    "PreparedCache",
    "WeightGradient",
    "input_gradient",
    "multiplied_dtype",
    "prepared_for",
    "weight_gradient",
    "why_no_weight_gradient",
    "why_not",
]
