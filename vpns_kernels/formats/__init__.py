"""How kept weights lie in memory; the portable form that is stored and that every backend starts from."""

from vpns_kernels.formats.base import Packed
from vpns_kernels.formats.packing import holding_pattern, pack, pick, unpack, validate, why_not

__all__ = ["Packed", "holding_pattern", "pack", "pick", "unpack", "validate", "why_not"]
