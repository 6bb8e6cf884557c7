"""What the cpu backends share: a packed weight in the order of the native kernel that runs it."""

from vpns_kernels.ops._cpu.cache import PreparedCache, prepared_for
from vpns_kernels.ops._cpu.prepared import Prepared, why_not

__all__ = ["Prepared", "PreparedCache", "prepared_for", "why_not"]
