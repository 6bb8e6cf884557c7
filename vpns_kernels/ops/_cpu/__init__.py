"""What the cpu backends share: a packed weight in the order of the native kernel that runs it."""

from vpns_kernels.ops._cpu.prepared import Prepared, why_not

__all__ = ["Prepared", "why_not"]
