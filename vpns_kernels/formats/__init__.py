"""How kept weights lie in memory; the portable form that is stored and that every backend starts from."""

from vpns_kernels.formats.base import Packed
from vpns_kernels.formats.packing import pack, pick, unpack, validate

__all__ = ["Packed", "pack", "pick", "unpack", "validate"]
